"""How far a build is, for whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cache_service.build.jobs import Shard
from cache_service.format.layout import row_bytes
from cache_service.format.spec import CacheSpec


@dataclass(frozen=True)
class Progress:
    """How far a build is. Rows and shards count this run's part, rates this run's work."""

    seed: int
    shard: int
    rows_done: int
    rows_total: int
    shards_done: int
    shards_total: int
    bytes_written: int
    rows_per_s: float

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate."""
        left = self.rows_total - self.rows_done
        return left / self.rows_per_s if self.rows_per_s > 0 else None


OnProgress = Callable[[Progress], None]


class Meter:
    """Counts what is committed and tells whoever listens."""

    def __init__(self, spec: CacheSpec, *, total: int, done: int, listener: OnProgress) -> None:
        self._spec = spec
        self._row_bytes = row_bytes(spec)
        self._total = total
        self._done = done
        self._rows_here = 0
        self._listener = listener
        self._started = time.monotonic()
        self.committed_here = 0

    def committed(self, key: Shard) -> None:
        """Count one shard."""
        start, stop = self._spec.shard_range(key.shard)
        self.committed_here += 1
        self._rows_here += stop - start
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rows_per_shard = self._spec.dataset.num_samples / self._spec.num_shards
        done = self._done + self.committed_here
        self._listener(
            Progress(
                seed=key.seed,
                shard=key.shard,
                rows_done=round(done * rows_per_shard),
                rows_total=round(self._total * rows_per_shard),
                shards_done=done,
                shards_total=self._total,
                bytes_written=self._rows_here * self._row_bytes,
                rows_per_s=self._rows_here / elapsed,
            )
        )
