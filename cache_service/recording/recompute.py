"""Ask the teacher again about recorded views, and compare with what is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cache_service.errors import ConfigError, RowsNotBuiltError, SpecMismatchError
from cache_service.format.cells import expand_cells
from cache_service.format.codecs import decode
from cache_service.reader import Cache
from cache_service.recording.config import BuildConfig
from cache_service.recording.opened import OpenedBuild, open_build

MIN_AGREEMENT = 0.99
"""Least share of cells in which teacher and cache name the same class. Rounding to float16 turns a
class only where two logits are within 0.1 % of each other."""


@dataclass(frozen=True)
class Recomputed:
    """How far the stored answers are from the teacher's answers now."""

    num_views: int
    views_equal: int
    max_abs_diff: float
    top1_agreement: float

    @property
    def accepted(self) -> bool:
        """Every view replays, and the answers name the same classes."""
        return self.views_equal == self.num_views and self.top1_agreement >= MIN_AGREEMENT


def recompute(cache: Cache, num_views: int, *, device: str = "auto") -> Recomputed:
    """Run `num_views` recorded views through the teacher again.

    Dataset and teacher are opened as the cache's provenance says, from the current folder.

    Raises:
        SpecMismatchError: what opens there is another dataset or teacher.
        RowsNotBuiltError: no seed is complete.
    """
    build = _open_again(cache, device)
    seeds = cache.complete_seeds()
    if not seeds:
        raise RowsNotBuiltError(f"no seed of {cache.url} is complete.")
    count = cache.spec.dataset.num_samples
    num_views = min(num_views, count)
    positions = np.arange(num_views, dtype=np.int64) * count // num_views
    equal, agreeing, cells, worst = 0, 0, 0, 0.0
    for start in range(0, num_views, build.config.batch_size):
        chosen = positions[start : start + build.config.batch_size]
        seed = seeds[(start // build.config.batch_size) % len(seeds)]
        views = build.views.render(seed, chosen)
        rows = cache.gather(seed, chosen)
        equal += int((rows["digest"] == views.digests_B).sum())
        stored = decode(cache.spec, rows, head=cache.head())
        now = build.teacher.answer(torch.from_numpy(views.pixels_BHW3))
        scales, kept = cache.spec.scales, cache.spec.stored_scales
        stored, now = expand_cells(stored, scales, kept), expand_cells(now, scales, kept)
        agreeing += int((stored.argmax(-1) == now.argmax(-1)).sum())
        cells += stored.shape[0] * stored.shape[1]
        worst = max(worst, float(np.abs(stored - now).max()))
    return Recomputed(num_views, equal, worst, agreeing / cells)


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
