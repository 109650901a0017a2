"""Finds the recorded rows of a sample: its place under each seed, and what is stored there.

Shape letters: R cells, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.api.page.answer import Floats, cell_logits
from cache_service.errors import CorruptError, RowsNotBuiltError
from cache_service.format.seeds import describe_seeds
from cache_service.format.spec import CacheSpec
from cache_service.rows.reader import Cache
from cache_service.views.draws import epoch_order

Commits = Mapping[int, Sequence[int]]
"""Recorded shards by seed, both ascending."""

NUM_OTHERS = 6
"""Other seeds that are shown beside the one that was asked for."""


class Row(NamedTuple):
    """The recorded row of one view.

    Attributes:
        logits_RC: of all cells, float32.
        digest, origin: of the view; see `cache_service.views.replay`.
    """

    seed: int
    sample: int
    position: int
    shard: int
    logits_RC: Floats
    digest: int
    origin: int


def find_row(cache: Cache, commits: Commits, seed: int, sample: int) -> Row:
    """The row of a sample under a seed.

    Args:
        cache: where to look.
        commits: its recorded shards by seed.
        seed, sample: which row.

    Raises:
        RowsNotBuiltError: it is not recorded, or there is no such sample.
        CorruptError: what is stored there is not what was committed.
    """
    spec = cache.spec
    if not 0 <= sample < spec.dataset.num_samples:
        raise RowsNotBuiltError(
            f"sample {sample} was asked for; {spec.dataset.name} has samples 0 to "
            f"{spec.dataset.num_samples - 1}."
        )
    position = place_of(spec, seed, sample)
    shard = position // spec.layout.shard_rows
    if shard not in commits.get(seed, ()):
        complete = [s for s, shards in commits.items() if len(shards) == spec.num_shards]
        raise RowsNotBuiltError(
            f"sample {sample} of seed {seed} is not recorded yet: it stands at position "
            f"{position:,}, in shard {shard}. Complete seeds: {describe_seeds(complete)}.",
            hint="Run the same `kd-cache build` again to finish it.",
        )
    found = cache.gather(seed, np.array([position], np.int64))
    if int(found["sample"][0]) != sample:
        raise CorruptError(
            f"position {position} of seed {seed} holds sample {found['sample'][0]}, not {sample}."
        )
    return Row(
        seed,
        sample,
        position,
        shard,
        cell_logits(spec, found, cache.head()),
        int(found["digest"][0]),
        int(found["origin"][0]),
    )


def find_others(cache: Cache, commits: Commits, seed: int, sample: int) -> list[Row]:
    """Rows of the same sample under the nearest other seeds that have it, by ascending seed."""
    near = sorted((s for s in commits if s != seed), key=lambda s: (abs(s - seed), s))
    chosen = []
    for other in near[: 3 * NUM_OTHERS]:  # an order of 1.28 M samples takes 0.1 s to work out
        shard = place_of(cache.spec, other, sample) // cache.spec.layout.shard_rows
        if shard in commits[other]:
            chosen.append(other)
        if len(chosen) == NUM_OTHERS:
            break
    return [find_row(cache, commits, other, sample) for other in sorted(chosen)]


def place_of(spec: CacheSpec, seed: int, sample: int) -> int:
    """Position of a sample in a seed's order."""
    return int(np.flatnonzero(epoch_order(spec.dataset.num_samples, seed) == sample)[0])


def first_recorded(spec: CacheSpec, commits: Commits) -> tuple[int, int] | None:
    """(seed, sample) to begin with: sample 0 where it is recorded; None in an empty cache."""
    if not commits:
        return None
    seed, shards = next(iter(commits.items()))
    if place_of(spec, seed, 0) // spec.layout.shard_rows in shards:
        return seed, 0
    start, _ = spec.shard_range(shards[0])
    return seed, int(epoch_order(spec.dataset.num_samples, seed)[start])


def neighbors_of(commits: Commits, seed: int) -> tuple[int | None, int | None]:
    """The recorded seeds before and after a seed."""
    before = [s for s in commits if s < seed]
    after = [s for s in commits if s > seed]
    return max(before, default=None), min(after, default=None)


def kept_view(cache: Cache, row: Row) -> NDArray[np.uint8] | None:
    """The view itself, uint8 [H, W, 3], where its row is one of the shard's witnesses."""
    places = cache.layout.witness_positions(row.shard)
    here = np.flatnonzero(places == row.position)
    if not here.size:
        return None
    view_HW3: NDArray[np.uint8] = cache.witnesses(row.seed, row.shard)[here[0]]
    return view_HW3


def kept_views(cache: Cache, row: Row) -> list[tuple[int, NDArray[np.uint8]]]:
    """(sample, view) of the witnesses of a row's shard."""
    places = cache.layout.witness_positions(row.shard)
    order = epoch_order(cache.spec.dataset.num_samples, row.seed)
    views = cache.witnesses(row.seed, row.shard)
    found = {int(order[p]): view for p, view in zip(places, views, strict=True)}
    return list(found.items())
