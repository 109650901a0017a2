"""What Prometheus reads at `/metrics`: one registry an application, labels with few values.

Request rates and latencies of the last minute, for the page.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest

from cache_service.api.http.limits import STREAM_SUFFIX, Gate
from cache_service.api.http.log import CLIENT_GONE, RequestRecord

MEDIA_TYPE = CONTENT_TYPE_LATEST

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for every series

KEPT_SERIES = 1024
"""More than there are routes times statuses."""

NO_CODE = "error"
"""Code of a failure that no error class of ours explains."""


class Metrics:
    """The figures of one application. Labels are route templates and codes, never names or rows.

    Attributes:
        registry: where other parts of the service add their own.
        rows: rows handed out; routes that answer rows count them.
        refused_connections: connections that the guard closed, by reason.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "kdcache_requests", "Requests that ended.", ("route", "code"), registry=self.registry
        )
        self._seconds = Histogram(
            "kdcache_request_duration_seconds",
            "From the whole header to the last byte; event streams are left out.",
            ("route",),
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._bytes = Counter(
            "kdcache_response_bytes", "Bytes of response bodies.", registry=self.registry
        )
        self._read_errors = Counter(
            "kdcache_read_errors", "Answers of status 5xx.", ("code",), registry=self.registry
        )
        self.rows = Counter("kdcache_rows", "Rows handed out.", registry=self.registry)
        self.refused_connections = Counter(
            "kdcache_refused_connections",
            "Connections closed by the guard.",
            ("reason",),
            registry=self.registry,
        )
        # Finding a series by its labels takes as long as counting in it.
        self._series = lru_cache(maxsize=KEPT_SERIES)(self._find_series)
        build_info = Gauge(
            "kdcache_build_info", "The version that runs.", ("version",), registry=self.registry
        )
        build_info.labels(version("kd-cache")).set(1)

    def watch(self, gate: Gate) -> None:
        """Show what a gate holds, as it is when it is asked."""
        in_flight = Gauge(
            "kdcache_inflight_requests", "Requests being answered.", registry=self.registry
        )
        in_flight.set_function(lambda: gate.in_flight)
        held = Gauge(
            "kdcache_held_answer_bytes",
            "Bytes of large answers that clients have not taken yet.",
            registry=self.registry,
        )
        held.set_function(lambda: gate.held_bytes)
        streams = Gauge("kdcache_event_streams", "Event streams open.", registry=self.registry)
        streams.set_function(lambda: gate.event_streams)
        reading = Gauge(
            "kdcache_reading_threads", "Threads reading storage.", registry=self.registry
        )
        reading.set_function(lambda: gate.reading.borrowed_tokens)

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        requests, seconds = self._series(record.route, record.status)
        requests.inc()
        self._bytes.inc(record.num_bytes)
        if seconds is not None:
            seconds.observe(record.seconds)
        if record.status >= 500:
            self._read_errors.labels(record.code or NO_CODE).inc()

    def _find_series(self, route: str, status: int) -> tuple[Counter, Histogram | None]:
        requests = self._requests.labels(route, str(status))
        is_stream = route.endswith(STREAM_SUFFIX)
        return requests, None if is_stream else self._seconds.labels(route)

    def count_refusal(self, reason: str) -> None:
        """Count a connection that the guard closed."""
        self.refused_connections.labels(reason).inc()

    def render(self) -> bytes:
        """The text that a scrape reads."""
        return generate_latest(self.registry)


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

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended, unless it is an event stream."""
        if record.route.endswith(STREAM_SUFFIX):
            return
        now = self._clock()
        if not self._seconds or self._seconds[-1][0] != int(now):
            self._seconds.append([int(now), 0, 0, 0])
            self._forget(now)
        last = self._seconds[-1]
        last[1] += 1
        last[2] += record.status >= 500 or record.status == CLIENT_GONE
        last[3] += record.num_bytes
        self._latencies.append((now, record.seconds))

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
