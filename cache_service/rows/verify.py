"""Checks that everything a cache claims to hold is present and intact, by reading every byte once.

Every object that a writer makes is accounted for: the metadata documents, the head of a `features`
cache, and for each committed shard its commit, its arrays and its witnesses. No torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import zarr

from cache_service.errors import CorruptError, UnsupportedError
from cache_service.format.commit import commit_key
from cache_service.format.layout import COMMITS_KEY, described_seeds
from cache_service.rows.reader import Cache


@dataclass
class VerifyReport:
    """The result of `verify_cache`.

    Attributes:
        shards_checked: committed shards that were read in full.
        rows_checked: rows in the intact ones.
        damaged: (seed, shard, reason) of each damaged shard.
        damaged_metadata: (key, reason) of each damaged or missing object that belongs to no shard.
        incomplete: number of missing shards of each seed that lacks some, from the first seed of
            which anything was written to the last planned one.
        complete: seeds of which every shard is committed.
        second_opinion: rows that zarr-python read from the same files and that equal ours.
    """

    shards_checked: int = 0
    rows_checked: int = 0
    damaged: list[tuple[int, int, str]] = field(default_factory=list)
    damaged_metadata: list[tuple[str, str]] = field(default_factory=list)
    incomplete: dict[int, int] = field(default_factory=dict)
    complete: list[int] = field(default_factory=list)
    second_opinion: int = 0

    @property
    def is_intact(self) -> bool:
        """Whether nothing is damaged. Shards may still be missing."""
        return not self.damaged and not self.damaged_metadata


def verify_cache(cache: Cache) -> VerifyReport:
    """Read and check every object of a cache. Damage is collected, not raised."""
    report = VerifyReport()
    commits = cache.commits()
    num_seeds = {
        key: described_seeds(cache.storage.get(key)) for key in cache.layout.seed_axis_keys()
    }
    first_seed = min(commits.keys() | _written_seeds(cache), default=0)
    # A damaged document may name any number, so the smallest one bounds the loop.
    for seed in sorted(commits.keys() | set(range(first_seed, min(num_seeds.values())))):
        shards = commits.get(seed, [])
        missing = cache.spec.num_shards - len(shards)
        if missing:
            report.incomplete[seed] = missing
        else:
            report.complete.append(seed)
        for shard in shards:
            report.shards_checked += 1
            try:
                report.rows_checked += _check_shard(cache, seed, shard)
            except CorruptError as damage:
                report.damaged.append((seed, shard, damage.message))
    report.damaged_metadata = _check_metadata(cache, num_seeds, max(commits, default=-1) + 1)
    if report.is_intact and report.rows_checked:
        report.second_opinion = _compare_with_zarr(cache)
    return report


def drop_damaged_commits(cache: Cache, report: VerifyReport) -> int:
    """Delete the commits of damaged shards, so that a build records them anew. Returns how many."""
    for seed, shard, _ in report.damaged:
        cache.storage.delete(commit_key(seed, shard))
    return len(report.damaged)


def _written_seeds(cache: Cache) -> set[int]:
    """Seeds of which a shard was written, whether or not its commit is there.

    Commits alone do not tell a seed that lost all of them from a seed that was never planned.
    """
    prefix = "sample/c/"
    try:
        keys = cache.storage.list(prefix)
    except UnsupportedError:  # a server lists only the commits
        return set()
    seeds = {key.removeprefix(prefix).partition("/")[0] for key in keys}
    return {int(seed) for seed in seeds if seed.isdecimal()}


def _check_shard(cache: Cache, seed: int, shard: int) -> int:
    start, stop = cache.spec.shard_range(shard)
    step = cache.spec.layout.chunk_rows
    for low in range(start, stop, step):
        cache.read(seed, low, min(low + step, stop))
    cache.witnesses(seed, shard)
    return stop - start


def _check_metadata(cache: Cache, num_seeds: dict[str, int], least: int) -> list[tuple[str, str]]:
    """(key, reason) of each damaged object that belongs to no shard."""
    damaged = []
    if cache.storage.get(COMMITS_KEY) != cache.layout.documents(1)[COMMITS_KEY]:
        damaged.append((COMMITS_KEY, f"{cache.url}/{COMMITS_KEY} is missing or damaged."))
    ((usual, _),) = Counter(num_seeds.values()).most_common(1)
    for key, length in num_seeds.items():
        if length != max(usual, least):
            reason = f"{cache.url}/{key} describes {length} seeds, not {max(usual, least)}."
            damaged.append((key, reason))
    try:
        cache.head()
    except CorruptError as damage:
        damaged.append(("head", damage.message))
    return damaged


def _compare_with_zarr(cache: Cache) -> int:
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
    for array in cache.arrays:
        stored = group[array.name]
        assert isinstance(stored, zarr.Array)
        if not np.array_equal(np.asarray(stored[seed, start:stop]), ours[array.name]):
            raise CorruptError(f"zarr-python reads other numbers from {cache.url}/{array.name}.")
    return stop - start
