"""Checks that everything a cache claims to hold is present and intact, by reading every byte once.

Every object that a writer makes is accounted for: the metadata documents, the head of a `features`
cache, and for each committed shard its commit, its arrays and its witnesses. Several processes may
check a shard each; a part of the shards, or a sample, may be checked instead of all. No torch.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import CorruptError, UnsupportedError, WorkersError
from cache_service.format.commit import commit_key
from cache_service.format.layout import COMMITS_KEY, described_seeds
from cache_service.format.spec import CacheSpec
from cache_service.interrupts import StopRequest, stop_on_signal
from cache_service.rows.reader import Cache
from cache_service.rows.shard_reader import Rows, ShardReader
from cache_service.storage import Readable

AHEAD = 4
"""Shards handed to each process ahead of the one whose result is awaited."""

POLL_S = 0.2
"""Interval between checks for Ctrl-C, seconds."""


class Checked(NamedTuple):
    """The result for one shard: its rows if it is intact, else why it is damaged."""

    seed: int
    shard: int
    rows: int
    damage: str = ""


class VerifyProgress(NamedTuple):
    """How far `verify_cache` is."""

    shards_done: int
    shards_total: int
    rows_done: int
    damaged: int


OnProgress = Callable[[VerifyProgress], None]


@dataclass
class VerifyReport:
    """The result of `verify_cache`.

    Attributes:
        shards_recorded: committed shards of the part.
        shards_checked: those of them that were read in full: all, or a sample.
        sample: (seed, shard) of the sampled ones; empty where all were read.
        rows_checked: rows in the intact ones.
        damaged: (seed, shard, reason) of each damaged shard.
        damaged_metadata: (key, reason) of each damaged or missing object that belongs to no shard.
        incomplete: number of missing shards of each seed that lacks some, from the first seed of
            which anything was written to the last planned one.
        complete: seeds of which every shard is committed.
        second_opinion: rows that zarr-python read from the same files and that equal ours.
    """

    shards_recorded: int = 0
    shards_checked: int = 0
    sample: list[tuple[int, int]] = field(default_factory=list)
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


def verify_cache(
    cache: Cache,
    *,
    part: tuple[int, int] = (0, 1),
    sample: float | None = None,
    processes: int = 1,
    on_progress: OnProgress = lambda _: None,
) -> VerifyReport:
    """Read and check every object of a cache. Damage is collected, not raised.

    Metadata is checked, and missing shards are counted, whatever is chosen.

    Args:
        cache: the recording.
        part: (index, count): check every `count`-th committed shard, from number `index` on.
        sample: check only some of them, see `choose_shards`.
        processes: that check shards; 1 checks them in this one.
        on_progress: called after every shard.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM was received.
        WorkersError: a process died.
    """
    report = VerifyReport()
    commits = cache.commits()
    num_seeds = {
        key: described_seeds(cache.storage.get(key)) for key in cache.layout.seed_axis_keys()
    }
    first_seed = min(commits.keys() | _written_seeds(cache), default=0)
    # A damaged document may name any number, so the smallest one bounds the loop.
    for seed in sorted(commits.keys() | set(range(first_seed, min(num_seeds.values())))):
        missing = cache.spec.num_shards - len(commits.get(seed, []))
        if missing:
            report.incomplete[seed] = missing
        else:
            report.complete.append(seed)
    index, count = part
    recorded = [(seed, shard) for seed, shards in commits.items() for shard in shards][index::count]
    chosen = choose_shards(cache.spec, recorded, sample)
    report.shards_recorded = len(recorded)
    report.sample = [] if sample is None else chosen
    intact: tuple[int, int] | None = None
    for checked in _check_all(cache, chosen, min(processes, len(chosen))):
        report.shards_checked += 1
        report.rows_checked += checked.rows
        if checked.damage:
            report.damaged.append((checked.seed, checked.shard, checked.damage))
        else:
            intact = intact or (checked.seed, checked.shard)
        on_progress(
            VerifyProgress(
                report.shards_checked, len(chosen), report.rows_checked, len(report.damaged)
            )
        )
    report.damaged_metadata = _check_metadata(cache, num_seeds, max(commits, default=-1) + 1)
    if report.is_intact and intact is not None:
        report.second_opinion = _compare_with_zarr(cache, *intact)
    return report


def choose_shards(
    spec: CacheSpec, recorded: Sequence[tuple[int, int]], sample: float | None
) -> list[tuple[int, int]]:
    """The shards to check: all, or a sample that is the same every time.

    A sample is evenly spaced over the shards in the order of seed and shard, and holds at least one
    shard: of k out of n, number i is that at floor((i + 0.5) n / k).

    Args:
        spec: of the cache.
        recorded: (seed, shard) of the committed shards.
        sample: a fraction below 1, or a number of rows, rounded up to whole shards; None for all.
    """
    if sample is None or not recorded:
        return list(recorded)
    num_shards = sample * len(recorded) if sample < 1 else sample / spec.layout.shard_rows
    count = math.ceil(min(num_shards, len(recorded)))
    return [recorded[(2 * i + 1) * len(recorded) // (2 * count)] for i in range(count)]


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


# --- shards, here or in other processes -----------------------------------------------------------


def _check_all(
    cache: Cache, shards: Iterable[tuple[int, int]], processes: int
) -> Iterator[Checked]:
    """The results of the shards, in their order."""
    if processes <= 1:
        for shard in shards:
            yield _check_shard(cache, *shard)
        return
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start, initargs=(cache,)
    )
    running: deque[Future[Checked]] = deque()
    with stop_on_signal() as stop:
        try:
            for shard in shards:
                running.append(_submit(pool, shard))
                if len(running) > AHEAD * processes:
                    yield _result(running.popleft(), stop)
            while running:
                yield _result(running.popleft(), stop)
        except BaseException:
            # They only read. During an outage of a bucket they would repeat requests for minutes.
            for process in list(pool._processes.values()):  # noqa: SLF001
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, shard: tuple[int, int]) -> Future[Checked]:
    """Hand a shard to the pool. A process that it starts inherits that SIGINT is blocked: Ctrl-C
    reaches all processes of a terminal, and this one decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_check_opened, *shard)
    except BrokenProcessPool as problem:
        raise _died() from problem
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _result(running: Future[Checked], stop: StopRequest) -> Checked:
    while True:
        if stop.requested:
            raise KeyboardInterrupt
        try:
            return running.result(POLL_S)
        except TimeoutError:
            continue
        except BrokenProcessPool as problem:
            raise _died() from problem


def _died() -> WorkersError:
    return WorkersError(
        "a process that checked shards died.",
        hint="Use fewer --processes: each needs memory for one shard.",
    )


_OPENED: list[Cache] = []
"""The cache that this process checks, if it is one of a pool."""


def _start(cache: Cache) -> None:
    _OPENED.append(cache)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # the pool's queue would be waited for without end

    threading.Thread(target=follow, daemon=True).start()


def _check_opened(seed: int, shard: int) -> Checked:
    return _check_shard(_OPENED[0], seed, shard)


def _check_shard(cache: Cache, seed: int, shard: int) -> Checked:
    layout, step = cache.layout, cache.spec.layout.chunk_rows
    start, stop = cache.spec.shard_range(shard)
    try:
        whole = _WholeObjects(cache.storage)
        reader = ShardReader(whole, layout, cache.commit(seed, shard), owner=object())
        for low in range(0, stop - start, step):
            high = min(low + step, stop - start)
            rows: dict[str, Rows] = {
                array.name: np.empty(high - low, f"V{array.row_bytes}") for array in layout.arrays
            }
            reader.read_into(low, high, rows, 0)
        reader.witnesses()
    except CorruptError as damage:
        return Checked(seed, shard, 0, damage.message)
    return Checked(seed, shard, stop - start)


class _WholeObjects:
    """Objects fetched whole: one request for each, where a reader would make one for each chunk.

    It keeps them, so it is made for one shard.
    """

    def __init__(self, storage: Readable) -> None:
        self.url = storage.url
        self._storage = storage
        self._kept: dict[str, NDArray[np.uint8]] = {}

    def get(self, key: str) -> bytes | None:
        return self._storage.get(key)

    def size(self, key: str) -> int | None:
        return self._storage.size(key)

    def map(self, key: str) -> NDArray[np.uint8] | None:
        content = self._storage.map(key)
        if content is None:
            content = np.frombuffer(self._storage.get(key) or b"", np.uint8)
        if len(content):
            self._kept[key] = content
        return self._kept.get(key)

    def get_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes] | None:
        """Of an object that was mapped before."""
        return [self._kept[key][start:stop].tobytes() for start, stop in ranges]


# --- metadata -------------------------------------------------------------------------------------


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


def _compare_with_zarr(cache: Cache, seed: int, shard: int) -> int:
    """Compare one chunk of every array of an intact shard with what zarr-python reads.

    Returns the number of rows; 0 where it cannot open the cache.

    Raises:
        CorruptError: zarr-python reads other numbers, so other people's tools would too.
    """
    if "://" in cache.url:
        return 0
    import zarr  # here, because the processes of a pool do without it

    group = zarr.open_group(cache.url, mode="r")
    start, stop = cache.spec.shard_range(shard)
    stop = min(stop, start + cache.spec.layout.chunk_rows)
    ours = cache.read(seed, start, stop)
    for array in cache.arrays:
        stored = group[array.name]
        assert isinstance(stored, zarr.Array)
        if not np.array_equal(np.asarray(stored[seed, start:stop]), ours[array.name]):
            raise CorruptError(f"zarr-python reads other numbers from {cache.url}/{array.name}.")
    return stop - start
