"""How far the views that are replayed now are from the recorded ones, by a shard's witnesses."""

from __future__ import annotations

from typing import NamedTuple

from cache_service.format.recipe import Recipe
from cache_service.rows.reader import Cache
from cache_service.views.identity import (
    ROUNDING_LEVELS,
    WitnessDiff,
    compare_views,
    explain_drift,
    library_versions,
)
from cache_service.views.replay import Views


class Drift(NamedTuple):
    """The difference of replayed views from recorded ones.

    Attributes:
        levels: largest difference of a color value of a witness; 255 without witnesses.
        description: how large the difference is, and which library changed.
    """

    levels: int
    description: str


def witness_diffs(cache: Cache, views: Views, seed: int, shard: int) -> list[WitnessDiff]:
    """The difference of each recorded witness of a shard from its replayed view."""
    recorded = cache.witnesses(seed, shard)
    replayed = views.render(seed, cache.group.layout.witness_positions(shard)).pixels_BHW3
    return [compare_views(*pair) for pair in zip(recorded, replayed, strict=True)]


def describe_drift(
    cache: Cache, views: Views, seed: int, shard: int, diffs: list[WitnessDiff]
) -> Drift:
    """The drift of a shard, with the libraries that it was recorded and is replayed with."""
    versions = cache.commit(seed, shard).versions
    levels = max((diff.max_levels for diff in diffs), default=255)
    return Drift(levels, explain_drift(versions, library_versions(views.recipe), diffs))


def first_drift(cache: Cache, views: Views) -> Drift | None:
    """The drift of the first recorded shard; None if nothing is recorded."""
    recorded = [(seed, shard) for seed, shards in cache.commits().items() for shard in shards]
    if not recorded:
        return None
    seed, shard = min(recorded)
    return describe_drift(cache, views, seed, shard, witness_diffs(cache, views, seed, shard))


def drift_advice(drift: Drift, recipe: Recipe) -> str:
    """What to do about a drift whose images and draws are proven to be the recorded ones."""
    if drift.levels > ROUNDING_LEVELS or recipe.callable is not None:
        return "Install the recorded versions, or record again."
    return (
        "Install the recorded versions, record again, or let rounding through by decision with "
        f"`replay: {{max_drift: {max(drift.levels, 4)}}}`."
    )
