"""How far a build is, for whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cache_service.format.layout import CacheLayout
from cache_service.format.spec import CacheSpec
from cache_service.recording.jobs import Shard


@dataclass(frozen=True)
class Progress:
    """How far a build is: told after every teacher batch and every committed shard.

    Attributes:
        seed, shard: of the latest commit.
        rows_done: committed rows of this part, by this run and those before it.
        rows_total: of this part.
        shards_done, shards_total: likewise.
        shards_committed: by this run.
        bytes_written: by this run, uncompressed.
        rows_per_s: answered by the teacher in this run.
    """

    seed: int
    shard: int
    rows_done: int
    rows_total: int
    shards_done: int
    shards_total: int
    shards_committed: int
    bytes_written: int
    rows_per_s: float

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate."""
        left = self.rows_total - self.rows_done
        return left / self.rows_per_s if self.rows_per_s > 0 else None


OnProgress = Callable[[Progress], None]


class Meter:
    """Counts what is answered and committed, and tells whoever listens."""

    def __init__(
        self, spec: CacheSpec, *, mine: list[Shard], todo: list[Shard], listener: OnProgress
    ) -> None:
        self._spec = spec
        self._row_bytes = CacheLayout(spec).row_bytes
        self._rows_total = sum(map(self._rows, mine))
        self._rows_before = self._rows_total - sum(map(self._rows, todo))
        self._shards_total = len(mine)
        self._shards_before = len(mine) - len(todo)
        self._rows_answered = 0
        self._rows_committed = 0
        self._latest = Shard(0, 0)
        self._listener = listener
        self._started = time.monotonic()
        self.committed_here = 0

    def answered(self, rows: int) -> None:
        """Count one teacher batch."""
        self._rows_answered += rows
        self._tell()

    def committed(self, key: Shard) -> None:
        """Count one shard."""
        self._latest = key
        self.committed_here += 1
        self._rows_committed += self._rows(key)
        self._tell()

    def _rows(self, key: Shard) -> int:
        start, stop = self._spec.shard_range(key.shard)
        return stop - start

    def _tell(self) -> None:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        self._listener(
            Progress(
                seed=self._latest.seed,
                shard=self._latest.shard,
                rows_done=self._rows_before + self._rows_committed,
                rows_total=self._rows_total,
                shards_done=self._shards_before + self.committed_here,
                shards_total=self._shards_total,
                shards_committed=self.committed_here,
                bytes_written=self._rows_committed * self._row_bytes,
                rows_per_s=self._rows_answered / elapsed,
            )
        )
