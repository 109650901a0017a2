"""The shards of a build: their division among processes, their order, and the progress.

A teacher batch never contains rows of two shards. The bytes of a shard therefore depend neither on
the order of recording nor on the process. This module does not import torch.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from cache_service.errors import ConfigError
from cache_service.format.layout import CacheLayout
from cache_service.format.spec import CacheSpec
from cache_service.rows.reader import list_commits
from cache_service.storage import Storage


class Shard(NamedTuple):
    """A shard of a seed, the unit of work of a build."""

    seed: int
    shard: int


class Job(NamedTuple):
    """A teacher batch: positions [start, stop) of a seed, all in the same shard."""

    seed: int
    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """Part `index` of `count` parts of a build, each of which one process records."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parse `i/n`. Numbering may start at 0 or 1: i is taken modulo n, so n/n equals 0/n.

        Raises:
            ConfigError: the text has another form, or i is larger than n.
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
        """Divide the part into `count` smaller parts."""
        return [Part(self.index + self.count * i, self.count * count) for i in range(count)]

    def select(self, shards: list[Shard]) -> list[Shard]:
        """Select every `count`-th shard, so that all parts advance through the seeds together."""
        return shards[self.index :: self.count]


SCATTER_WINDOW = 64
"""Shards among which a builder chooses: few enough that seeds are completed about in order, so that
a student can start early; many enough that two builders choose one shard in about 3 of 100 cases.
"""

WHOLE = Part()
"""The part that contains all shards."""


def all_shards(spec: CacheSpec, seeds: Sequence[int]) -> list[Shard]:
    """List all shards of the seeds in the order of recording."""
    return [Shard(seed, shard) for seed in seeds for shard in range(spec.num_shards)]


def not_recorded(storage: Storage, spec: CacheSpec, shards: Iterable[Shard]) -> list[Shard]:
    """Those of the shards without a commit, in the same order, by one listing of the storage."""
    commits = list_commits(storage, spec)
    recorded = {Shard(seed, shard) for seed, shards in commits.items() for shard in shards}
    return [shard for shard in shards if shard not in recorded]


def num_rows(spec: CacheSpec, shards: Iterable[Shard]) -> int:
    """Count the rows of these shards."""
    ranges = (spec.shard_range(shard) for _, shard in shards)
    return sum(stop - start for start, stop in ranges)


def teacher_batches(spec: CacheSpec, shards: Iterable[Shard], batch_size: int) -> Iterator[Job]:
    """Divide shards into batches, none of which contains rows of two shards.

    A shard is taken only when its first batch is requested, so the order may change until then.
    """
    for seed, shard in shards:
        first, last = spec.shard_range(shard)
        for start in range(first, last, batch_size):
            yield Job(seed, shard, start, min(start + batch_size, last))


class ShardOrder:
    """The order of recording, in which shards can be prioritized during a build.

    Shards that a client waits for are recorded first, in the order of the requests. `prioritize`
    may be called from another thread, and also before the iteration starts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prioritized: deque[Shard] = deque()
        self._window = 1

    def prioritize(self, shard: Shard) -> None:
        """Record this shard before those that nobody requested, unless it has been started."""
        with self._lock:
            self._prioritized.append(shard)

    def scatter(self) -> None:
        """From now on, take any of the next SCATTER_WINDOW shards.

        Builders that cannot exclude each other seldom take the same shard then.
        """
        self._window = SCATTER_WINDOW

    def through(self, shards: Iterable[Shard]) -> Iterator[Shard]:
        """Yield each shard once. The next shard is chosen when it is requested."""
        left = OrderedDict.fromkeys(shards)
        # Not seeded: builders in two containers may have the same host name and process number.
        chance = random.Random()  # noqa: S311  nothing secret depends on it
        while left:
            shard = self._next_prioritized(left) or next(
                islice(left, chance.randrange(min(self._window, len(left))), None)
            )
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
    """The progress of a build, reported after every teacher batch and every committed shard.

    Attributes:
        seed, shard: the latest committed shard.
        rows_done: number of committed rows of this part, including earlier runs and what other
            builders have committed, as far as this one has noticed.
        rows_answered: number of rows of this part that the teacher has answered, including those
            committed by others; ahead of `rows_done` by what is not committed yet.
        rows_total: number of rows of this part.
        shards_done: number of committed shards of this part, as in `rows_done`.
        shards_total: number of shards of this part.
        shards_committed: number of shards that this run has committed.
        bytes_written: bytes that this run has committed, uncompressed.
        rows_per_s: rate of the teacher in this run, rows per second.
    """

    seed: int = 0
    shard: int = 0
    rows_done: int = 0
    rows_answered: int = 0
    rows_total: int = 0
    shards_done: int = 0
    shards_total: int = 0
    shards_committed: int = 0
    bytes_written: int = 0
    rows_per_s: float = 0.0

    @property
    def eta_s(self) -> float | None:
        """Estimated remaining time, seconds; None before the first teacher batch."""
        left = self.rows_total - self.rows_answered
        return left / self.rows_per_s if self.rows_per_s > 0 else None

    @classmethod
    def sum(cls, parts: Sequence[Progress]) -> Progress:
        """Add the counts of several parts. The latest commit is that of the last part."""
        if not parts:
            return cls()
        counts = vars(parts[0]).keys() - {"seed", "shard"}
        return replace(
            parts[-1], **{name: sum(getattr(part, name) for part in parts) for name in counts}
        )


OnProgress = Callable[[Progress], None]


class ProgressMeter:
    """Counts rows of the teacher and committed shards, and reports the progress."""

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
        self._rows_lost = 0
        self._rows_committed = 0
        self._latest = Shard(0, 0)
        self._on_progress = on_progress
        self._started_s = time.monotonic()
        self.shards_committed = 0

    def add_answers(self, rows: int) -> None:
        """Add the rows of one teacher batch."""
        self._rows_answered += rows
        self._report()

    def add_commit(self, shard: Shard) -> None:
        """Add one committed shard."""
        self._latest = shard
        self.shards_committed += 1
        self._rows_committed += num_rows(self._spec, [shard])
        self._report()

    def add_found(self, shard: Shard, *, answered: bool = False) -> None:
        """Add one shard that another builder has committed.

        Args:
            shard: that is committed.
            answered: whether the teacher of this builder has answered it, too.
        """
        rows = num_rows(self._spec, [shard])
        self._latest = shard
        self._rows_before += rows
        self._shards_before += 1
        self._rows_lost += rows if answered else 0
        self._report()

    def _report(self) -> None:
        # The lower bound avoids a division by 0 on clocks with a coarse resolution.
        answered = self._rows_before + self._rows_answered - self._rows_lost
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        self._on_progress(
            Progress(
                seed=self._latest.seed,
                shard=self._latest.shard,
                rows_done=self._rows_before + self._rows_committed,
                rows_answered=min(answered, self._rows_total),
                rows_total=self._rows_total,
                shards_done=self._shards_before + self.shards_committed,
                shards_total=self._shards_total,
                shards_committed=self.shards_committed,
                bytes_written=self._rows_committed * self._row_bytes,
                rows_per_s=self._rows_answered / elapsed_s,
            )
        )
