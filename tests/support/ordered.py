"""Caches of known rows in the order of their seeds, as a build writes them; made without torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cache_service.format.spec import CacheSpec
from cache_service.rows.reader import Cache
from cache_service.rows.writer import CacheWriter
from cache_service.storage.retries import RetryPolicy
from cache_service.views.order import epoch_order
from support.caches import make_rows, open_writer, write_shard

QUICK = RetryPolicy(first_s=5.0, total_s=10.0, attempts=6, base_s=0.005, cap_s=0.05)
"""For tests of what passes."""


def ordered_rows(spec: CacheSpec, seed: int) -> dict[str, Any]:
    order = epoch_order(spec.dataset.num_samples, seed).copy()
    return make_rows(spec, seed) | {"sample": order}


def write_ordered(
    folder: Path, spec: CacheSpec, *, seeds: int = 2, shards: Iterable[int] | None = None
) -> CacheWriter:
    """A cache with these shards of each seed recorded; by default all."""
    writer = open_writer(str(folder), spec, seeds)
    chosen = list(range(spec.num_shards) if shards is None else shards)
    for seed in range(seeds):
        rows = ordered_rows(spec, seed)
        for shard in chosen:
            write_shard(writer, seed, shard, rows=rows)
    writer.storage.sweep()
    return writer


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether two sets of rows are equal byte for byte, types and shapes included."""
    return found.keys() == wanted.keys() and all(
        values.dtype == wanted[name].dtype
        and values.shape == wanted[name].shape
        and values.tobytes() == wanted[name].tobytes()
        for name, values in found.items()
    )


def epoch_in_batches(cache: Cache, seed: int, size: int) -> dict[str, Any]:
    """All rows of a seed, read as training reads them."""
    count = cache.spec.dataset.num_samples
    parts = [cache.read(seed, low, min(low + size, count)) for low in range(0, count, size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
