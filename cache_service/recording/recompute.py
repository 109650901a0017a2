"""Runs recorded views through the teacher again and compares its answers with the stored ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache_service.errors import ConfigError, RowsNotBuiltError, SpecMismatchError
from cache_service.format.cells import expand_cells
from cache_service.format.seeds import describe_seeds
from cache_service.format.spec import CacheSpec
from cache_service.recording.config import BuildConfig
from cache_service.recording.opened import OpenedBuild, open_build
from cache_service.rows.reader import Cache

MIN_AGREEMENT = 0.99
"""Smallest fraction of cells in which teacher and cache must name the same class. Rounding to
float16 changes a class only where two logits are within 0.1 % of each other."""

MAX_RELATIVE_ERROR = 0.05
"""Largest root-mean-square difference of stored and new logits, per seed, as a fraction of the new
logits' standard deviation over the classes of a cell. int8 and bfloat16 on another device stay
below 0.03; another teacher is near 1, and the same one with a wrong scale shows its factor."""

FLOAT16_ROUNDING = 2.0**-10
"""Relative difference that rounding to float16 makes at most, with some room."""


@dataclass(frozen=True)
class Comparison:
    """Difference between the stored answers and the teacher's answers now.

    Attributes:
        num_views: views that were compared.
        num_seeds: seeds that they belong to.
        num_shards: shards that they lie in.
        views_equal: views whose pixels were reproduced exactly.
        max_abs_diff: largest difference of a stored logit.
        top1_agreement: fraction of cells in which both name the same class.
        relative_error: of each seed; see `MAX_RELATIVE_ERROR`.
    """

    num_views: int
    num_seeds: int
    num_shards: int
    views_equal: int
    max_abs_diff: float
    top1_agreement: float
    relative_error: dict[int, float]

    @property
    def other_seeds(self) -> list[int]:
        """Seeds whose stored logits are not those of this teacher, ascending."""
        return [s for s, error in self.relative_error.items() if not error <= MAX_RELATIVE_ERROR]

    @property
    def accepted(self) -> bool:
        """Whether every view replays and the answers of every seed are this teacher's."""
        replayed = self.views_equal == self.num_views
        return replayed and self.top1_agreement >= MIN_AGREEMENT and not self.other_seeds

    def lines(self) -> list[str]:
        """The result in words, a sentence a line."""
        counts = f"{self.num_views} views of {self.num_shards} shards and {self.num_seeds} seeds"
        lines = [
            (
                f"recomputed {counts}: {self.views_equal} replay exactly, largest difference "
                f"{self.max_abs_diff:.4f}, same class in {self.top1_agreement:.2%} of cells"
            )
        ]
        if self.other_seeds:
            lines.append(
                f"refused: the stored logits of seeds {describe_seeds(self.other_seeds)} are not "
                "those that the teacher computes now (relative error "
                f"{max(self.relative_error.values()):.2f}, allowed {MAX_RELATIVE_ERROR})"
            )
        return lines


def recompute(cache: Cache, num_views: int, *, device: str = "auto") -> Comparison:
    """Run `num_views` recorded views, spread over all seeds and shards, through the teacher again.

    Dataset and teacher are opened as the cache's provenance says, from the current folder.

    Raises:
        SpecMismatchError: what opens there is another dataset or teacher.
        RowsNotBuiltError: no shard is recorded.
    """
    chosen = spread_views(cache.spec, cache.commits(), num_views)
    if not chosen:
        raise RowsNotBuiltError(f"no shard of {cache.url} is recorded.")
    build = _open_again(cache, device)
    codec = cache.spec.codec
    total, equal, agreeing, cells, worst = 0, 0, 0, 0, 0.0
    errors = {}
    shards = set()
    for seed, positions in chosen.items():
        squares, variances = 0.0, 0.0
        for start in range(0, len(positions), build.config.batch_size):
            batch = positions[start : start + build.config.batch_size]
            views = build.views.render(seed, batch)
            rows = cache.gather(seed, batch)
            total, equal = (
                total + len(batch),
                equal + int((rows["digest"] == views.digests_B).sum()),
            )
            shards |= {(seed, shard) for shard in (batch // cache.spec.layout.shard_rows).tolist()}
            stored = cache.spec.decode(rows, head=cache.head())
            now = build.teacher.answer(torch.from_numpy(views.pixels_BHW3))
            stored, now = codec.kept_logits(rows, stored), codec.kept_logits(rows, now)
            scales, kept = cache.spec.scales, cache.spec.stored_scales
            stored, now = expand_cells(stored, scales, kept), expand_cells(now, scales, kept)
            agreeing += int((stored.argmax(-1) == now.argmax(-1)).sum())
            cells += stored.shape[0] * stored.shape[1]
            difference = np.abs(stored - now)
            worst = max(worst, float(difference.max()))
            beyond_rounding = np.maximum(difference - FLOAT16_ROUNDING * np.abs(now), 0)
            squares += float(np.square(beyond_rounding, dtype=np.float64).sum())
            variances += float(now.var(axis=-1, dtype=np.float64).sum()) * now.shape[-1]
        errors[seed] = float(np.sqrt(squares / max(variances, 1e-12)))
    return Comparison(total, len(chosen), len(shards), equal, worst, agreeing / cells, errors)


def spread_views(
    spec: CacheSpec, commits: Mapping[int, Sequence[int]], num_views: int
) -> dict[int, NDArray[np.int64]]:
    """Positions to compare of each seed, ascending: `num_views` in all, or every recorded one.

    Views are divided evenly over the seeds, and evenly spaced over the recorded shards of each.
    The first position differs from seed to seed, so that few views of many seeds still reach
    every part of the epoch.

    Args:
        spec: of the cache.
        commits: recorded shards by seed.
        num_views: wanted.
    """
    recorded = {
        seed: np.concatenate([np.arange(*spec.shard_range(shard)) for shard in shards])
        for seed, shards in commits.items()
    }
    chosen = {}
    left = num_views
    # Seeds with the fewest rows first: what they cannot give is divided over the others.
    by_size = sorted(recorded, key=lambda seed: (len(recorded[seed]), seed))
    counts = {}
    for done, seed in enumerate(by_size):
        counts[seed] = min(len(recorded[seed]), left // (len(by_size) - done))
        left -= counts[seed]
    for number, seed in enumerate(recorded):
        if counts[seed]:
            places = np.arange(counts[seed]) + (number + 0.5) / len(recorded)
            places = (places * len(recorded[seed]) / counts[seed]).astype(np.int64)
            chosen[seed] = recorded[seed][places]
    return chosen


def _open_again(cache: Cache, device: str) -> OpenedBuild:
    provenance: dict[str, Any] = cache.group.provenance
    if not provenance:
        raise ConfigError(f"{cache.url} does not say how to open its dataset and teacher.")
    spec = cache.spec
    config = BuildConfig.model_validate(
        {
            "cache": cache.url,
            "dataset": provenance["dataset"],
            "teacher": provenance["teacher"],
            "augment": _augment(spec.recipe.model_dump(mode="json")),
            "scales": spec.scales,
            "codec": spec.codec,
            "layout": spec.layout,
            "seeds": 0,
            "device": device,
        }
    )
    build = open_build(config)
    for field in ("dataset", "teacher"):
        found, recorded = getattr(build.spec, field), getattr(spec, field)
        if found != recorded:
            raise SpecMismatchError(
                f"the {field} that opens now is not the one that {cache.url} was recorded with: "
                f"{found.model_dump_json()} against {recorded.model_dump_json()}."
            )
    return build


def _augment(recipe: dict[str, Any]) -> dict[str, Any]:
    given = "callable" if recipe["callable"] is not None else "ops"
    return {"size": recipe["size"], given: recipe[given]}
