"""Request rates and latencies of the last minute, for the page."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from cache_service.api.limits import STREAM_SUFFIX
from cache_service.api.observe import CLIENT_GONE, Seen

WINDOW_SECONDS = 60

KEPT_LATENCIES = 2000
"""Durations kept for the percentiles: the latest, however busy the minute."""


class Live:
    """Counts by second, in a ring of one minute, and the latest durations."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = clock()
        self._seconds: deque[list[int]] = deque()  # [second, requests, errors, bytes], ascending
        self._latencies: deque[tuple[float, float]] = deque(maxlen=KEPT_LATENCIES)

    def observe(self, batch: Sequence[Seen]) -> None:
        """Count requests that have ended. Event streams are not requests in this sense."""
        for seen in batch:
            self._count(seen)

    def _count(self, seen: Seen) -> None:
        if seen.route.endswith(STREAM_SUFFIX):
            return
        now = self._clock()
        if not self._seconds or self._seconds[-1][0] != int(now):
            self._seconds.append([int(now), 0, 0, 0])
            self._forget(now)
        last = self._seconds[-1]
        last[1] += 1
        last[2] += seen.status >= 500 or seen.status == CLIENT_GONE
        last[3] += seen.num_bytes
        self._latencies.append((now, seen.seconds))

    def figures(self) -> dict[str, Any]:
        """Rates over the last minute (or since the start), and latencies in milliseconds."""
        now = self._clock()
        self._forget(now)
        seconds = min(max(now - self._begun, 1.0), WINDOW_SECONDS)
        recent = sorted(s for at, s in self._latencies if now - at <= WINDOW_SECONDS)
        return {
            "requests_per_second": sum(each[1] for each in self._seconds) / seconds,
            "errors_per_second": sum(each[2] for each in self._seconds) / seconds,
            "bytes_per_second": sum(each[3] for each in self._seconds) / seconds,
            "p50_ms": 1000 * quantile(recent, 0.5) if recent else None,
            "p99_ms": 1000 * quantile(recent, 0.99) if recent else None,
        }

    def _forget(self, now: float) -> None:
        while self._seconds and self._seconds[0][0] <= now - WINDOW_SECONDS:
            self._seconds.popleft()


def quantile(ascending: list[float], share: float) -> float:
    """The smallest value that so large a share does not exceed."""
    return ascending[max(math.ceil(share * len(ascending)) - 1, 0)]
