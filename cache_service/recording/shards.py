"""The shards of a build: who records which, in what order, and how far the work is. No torch.

The bytes of a shard depend neither on the order nor on the process that records it, because teacher
batches never cross the edge of a shard.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cache_service.errors import ConfigError
from cache_service.format.layout import CacheLayout
from cache_service.format.spec import CacheSpec


class Shard(NamedTuple):
    """One unit of work."""

    seed: int
    shard: int


class Job(NamedTuple):
    """One teacher batch: positions [start, stop) of a seed, all in one shard."""

    seed: int
    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """One of `count` builders that share a build; `index` counts modulo `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """`i/n`. Numbering may start at 0 or at 1: i is taken modulo n, so n/n is 0/n.

        Raises:
            ConfigError: not of that form, or i beyond n.
        """
        first, slash, second = text.partition("/")
        if not (slash and first.isdigit() and second.isdigit()):
            raise ConfigError(f"--shard {text!r} is not of the form i/n.", hint="Such as 0/4.")
        index, count = int(first), int(second)
        if count < 1 or index > count:
            raise ConfigError(
                f"--shard {text!r}: there are {count} parts.", hint=f"Use 0/{count} and up."
            )
        return cls(index % count, count)

    def split(self, count: int) -> list[Part]:
        """The part divided into `count` smaller ones."""
        return [Part(self.index + self.count * i, self.count * count) for i in range(count)]

    def select(self, shards: list[Shard]) -> list[Shard]:
        """Every `count`-th shard, so that parts advance through the seeds side by side."""
        return shards[self.index :: self.count]


WHOLE = Part()
"""The part of a builder that works alone."""


def all_shards(spec: CacheSpec, seeds: Sequence[int]) -> list[Shard]:
    """Every shard of the seeds in the order of recording."""
    return [Shard(seed, shard) for seed in seeds for shard in range(spec.num_shards)]


def num_rows(spec: CacheSpec, shards: Iterable[Shard]) -> int:
    """Rows of these shards."""
    ranges = (spec.shard_range(shard) for _, shard in shards)
    return sum(stop - start for start, stop in ranges)


def teacher_batches(spec: CacheSpec, shards: Iterable[Shard], batch_size: int) -> Iterator[Job]:
    """Cut shards into batches that never cross the edge of a shard.

    Shards are taken one by one as batches are requested, so that their order may still change.
    """
    for seed, shard in shards:
        first, last = spec.shard_range(shard)
        for start in range(first, last, batch_size):
            yield Job(seed, shard, start, min(start + batch_size, last))


class ShardOrder:
    """The planned order, in which shards can be moved to the front while a build runs.

    Shards that a client waits for come first, in the order of the requests. They may be moved from
    another thread, also before the iteration starts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prioritized: deque[Shard] = deque()

    def prioritize(self, shard: Shard) -> None:
        """Take this shard next, unless it has been taken already."""
        with self._lock:
            self._prioritized.append(shard)

    def through(self, shards: Iterable[Shard]) -> Iterator[Shard]:
        """Each of the shards once. The next one is chosen when it is requested."""
        left = OrderedDict.fromkeys(shards)
        while left:
            shard = self._next_prioritized(left) or next(iter(left))
            del left[shard]
            yield shard

    def _next_prioritized(self, left: OrderedDict[Shard, None]) -> Shard | None:
        with self._lock:
            while self._prioritized:
                shard = self._prioritized.popleft()
                if shard in left:
                    return shard
        return None


@dataclass(frozen=True)
class Progress:
    """How far a build is. It is reported after every teacher batch and every committed shard.

    Attributes:
        seed, shard: of the latest commit.
        rows_done: committed rows of this part, by this run and those before it.
        rows_total: of this part.
        shards_done, shards_total: likewise.
        shards_committed: by this run.
        bytes_written: by this run, uncompressed.
        rows_per_s: answered by the teacher in this run.
    """

    seed: int = 0
    shard: int = 0
    rows_done: int = 0
    rows_total: int = 0
    shards_done: int = 0
    shards_total: int = 0
    shards_committed: int = 0
    bytes_written: int = 0
    rows_per_s: float = 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate."""
        left = self.rows_total - self.rows_done
        return left / self.rows_per_s if self.rows_per_s > 0 else None

    @classmethod
    def sum(cls, parts: Sequence[Progress]) -> Progress:
        """Of several parts: their counts together, and the latest commit of the last of them."""
        if not parts:
            return cls()
        counts = vars(parts[0]).keys() - {"seed", "shard"}
        return replace(
            parts[-1], **{name: sum(getattr(part, name) for part in parts) for name in counts}
        )


OnProgress = Callable[[Progress], None]


class ProgressMeter:
    """Counts answered rows and committed shards, and reports them."""

    def __init__(
        self, spec: CacheSpec, *, part: list[Shard], pending: list[Shard], on_progress: OnProgress
    ) -> None:
        self._spec = spec
        self._row_bytes = CacheLayout(spec).row_bytes
        self._rows_total = num_rows(spec, part)
        self._rows_before = self._rows_total - num_rows(spec, pending)
        self._shards_total = len(part)
        self._shards_before = len(part) - len(pending)
        self._rows_answered = 0
        self._rows_committed = 0
        self._latest = Shard(0, 0)
        self._on_progress = on_progress
        self._started_s = time.monotonic()
        self.shards_committed = 0

    def add_answers(self, rows: int) -> None:
        """Count one teacher batch."""
        self._rows_answered += rows
        self._report()

    def add_commit(self, shard: Shard) -> None:
        """Count one shard."""
        self._latest = shard
        self.shards_committed += 1
        self._rows_committed += num_rows(self._spec, [shard])
        self._report()

    def _report(self) -> None:
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        self._on_progress(
            Progress(
                seed=self._latest.seed,
                shard=self._latest.shard,
                rows_done=self._rows_before + self._rows_committed,
                rows_total=self._rows_total,
                shards_done=self._shards_before + self.shards_committed,
                shards_total=self._shards_total,
                shards_committed=self.shards_committed,
                bytes_written=self._rows_committed * self._row_bytes,
                rows_per_s=self._rows_answered / elapsed_s,
            )
        )
