"""Is everything that a cache claims to hold there and intact? Reads every byte once. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import zarr

from cache_service.errors import CorruptError
from cache_service.format.commit import commit_key
from cache_service.format.layout import row_arrays
from cache_service.reader import Cache


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        shards_checked: committed shards read in full.
        rows_checked: rows in those that are intact.
        damaged: (seed, shard, what is wrong) of each shard that is not.
        incomplete: seeds from the first recorded one on that lack shards, and how many.
        complete: seeds with every shard committed.
        second_opinion: rows that zarr-python read from the same files, equal to ours.
    """

    shards_checked: int = 0
    rows_checked: int = 0
    damaged: list[tuple[int, int, str]] = field(default_factory=list)
    incomplete: dict[int, int] = field(default_factory=dict)
    complete: list[int] = field(default_factory=list)
    second_opinion: int = 0


def audit(
    cache: Cache, *, on_shard: Callable[[int, int], None] = lambda _seed, _shard: None
) -> Audit:
    """Read and check every committed shard. Damage is collected, not raised."""
    found = Audit()
    commits = cache.commits()
    # A seed without any shard is a hole where others are recorded before it, or were planned after.
    for seed in range(min(commits, default=0), cache.num_seeds()):
        shards = commits.get(seed, [])
        missing = cache.spec.num_shards - len(shards)
        if missing:
            found.incomplete[seed] = missing
        else:
            found.complete.append(seed)
        for shard in shards:
            on_shard(seed, shard)
            found.shards_checked += 1
            try:
                found.rows_checked += _check_shard(cache, seed, shard)
            except CorruptError as damage:
                found.damaged.append((seed, shard, damage.message))
    cache.head()
    if not found.damaged and found.rows_checked:
        found.second_opinion = _ask_zarr(cache)
    return found


def repair(cache: Cache, found: Audit) -> int:
    """Drop the commits of damaged shards, so that a build records them anew. Returns how many."""
    for seed, shard, _ in found.damaged:
        cache.storage.delete(commit_key(seed, shard))
    return len(found.damaged)


def _check_shard(cache: Cache, seed: int, shard: int) -> int:
    start, stop = cache.spec.shard_range(shard)
    step = cache.spec.layout.chunk_rows
    for low in range(start, stop, step):
        cache.read(seed, low, min(low + step, stop))
    cache.witnesses(seed, shard)
    return stop - start


def _ask_zarr(cache: Cache) -> int:
    """Compare one chunk of every array with what zarr-python reads; 0 rows where it cannot open.

    Raises:
        CorruptError: zarr-python reads other numbers, so other people's tools would too.
    """
    if "://" in cache.url:
        return 0
    group = zarr.open_group(cache.url, mode="r")
    seed, shards = next(iter(cache.commits().items()))
    start, stop = cache.spec.shard_range(shards[0])
    stop = min(stop, start + cache.spec.layout.chunk_rows)
    ours = cache.read(seed, start, stop)
    for array in row_arrays(cache.spec):
        stored = group[array.name]
        assert isinstance(stored, zarr.Array)
        if not np.array_equal(np.asarray(stored[seed, start:stop]), ours[array.name]):
            raise CorruptError(f"zarr-python reads other numbers from {cache.url}/{array.name}.")
    return stop - start
