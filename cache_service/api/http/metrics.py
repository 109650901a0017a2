"""Figures of the requests: for Prometheus at `/metrics`, and of the last minute for the page."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest

from cache_service.api.http.limits import STREAM_SUFFIX, ConcurrencyLimiter
from cache_service.api.http.log import CLIENT_GONE, RequestRecord

MEDIA_TYPE = CONTENT_TYPE_LATEST

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

NO_CODE = "error"
"""Code of a failure that has no problem code."""

WINDOW_SECONDS = 60

KEPT_LATENCIES = 2000
"""Durations kept for the percentiles: the latest ones of the minute."""

disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for every series


class Metrics:
    """The Prometheus metrics of one application.

    Labels are route templates and codes, never names of caches, so the number of series is bounded.

    Attributes:
        registry: other parts of the service add their own metrics to it.
        rows: rows sent; the routes that send rows count them.
    """

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # process_cpu_seconds_total and others
        self._requests = Counter(
            "kdcache_requests", "Requests that ended.", ("route", "code"), registry=registry
        )
        self._seconds = Histogram(
            "kdcache_request_duration_seconds",
            "From the end of the header to the last byte; event streams are left out.",
            ("route",),
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._bytes = Counter("kdcache_response_bytes", "Bytes sent.", registry=registry)
        self._read_errors = Counter(
            "kdcache_read_errors", "Responses with a status of 5xx.", ("code",), registry=registry
        )
        self._known: dict[tuple[str, int], tuple[Counter, Histogram | None]] = {}
        self.rows = Counter("kdcache_rows", "Rows sent.", registry=registry)
        self._refused_connections = Counter(
            "kdcache_refused_connections", "Closed connections.", ("reason",), registry=registry
        )
        build_info = Gauge("kdcache_build_info", "Running now.", ("version",), registry=registry)
        build_info.labels(version("kd-cache")).set(1)

    def watch(self, limiter: ConcurrencyLimiter) -> None:
        """Show the counts of a limiter as they are at each scrape."""
        for name, meaning, value in (
            ("inflight_requests", "Requests in flight.", lambda: limiter.in_flight),
            ("held_answer_bytes", "Large responses not yet sent.", lambda: limiter.held_bytes),
            ("event_streams", "Open event streams.", lambda: limiter.event_streams),
            ("reading_threads", "Busy threads.", lambda: limiter.reading.borrowed_tokens),
        ):
            self.add_gauge(f"kdcache_{name}", meaning, value)

    def add_gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Show a figure of another part of the service as it is at each scrape."""
        Gauge(name, meaning, registry=self.registry).set_function(value)

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        known = self._known.get((record.route, record.status))
        if known is None:
            # Looking up the labels takes as long as counting, and there are few of them.
            is_stream = record.route.endswith(STREAM_SUFFIX)
            known = self._known[record.route, record.status] = (
                self._requests.labels(record.route, str(record.status)),
                None if is_stream else self._seconds.labels(record.route),
            )
        counted, seconds = known
        counted.inc()
        self._bytes.inc(record.bytes)
        if seconds is not None:
            seconds.observe(record.seconds)
        if record.status >= 500:
            self._read_errors.labels(record.code or NO_CODE).inc()

    def count_refusal(self, reason: str) -> None:
        """Count a connection that the connection limits closed."""
        self._refused_connections.labels(reason).inc()

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class RecentTraffic:
    """Requests of the last minute: counts by second, and the latest durations."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._seconds: deque[list[int]] = deque()  # [second, requests, errors, bytes], ascending
        self._latencies: deque[tuple[float, float]] = deque(maxlen=KEPT_LATENCIES)

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended, unless it is an event stream."""
        if record.route.endswith(STREAM_SUFFIX):
            return
        now = self._clock()
        if not self._seconds or self._seconds[-1][0] != int(now):
            self._seconds.append([int(now), 0, 0, 0])
            self._drop_old(now)
        last = self._seconds[-1]
        last[1] += 1
        last[2] += record.status >= 500 or record.status == CLIENT_GONE
        last[3] += record.bytes
        self._latencies.append((now, record.seconds))

    def figures(self) -> dict[str, float | None]:
        """Rates over the last minute (or since the start), and quantiles of the latency.

        `failed_per_s` counts server errors and requests that the client abandoned. The quantiles
        are None if there was no request.
        """
        now = self._clock()
        self._drop_old(now)
        seconds = min(max(now - self._started, 1.0), WINDOW_SECONDS)
        requests, failed, num_bytes = (sum(each[i] for each in self._seconds) for i in (1, 2, 3))
        recent = sorted(s for at, s in self._latencies if now - at <= WINDOW_SECONDS)
        p50, p99 = (quantile(recent, q) for q in (0.5, 0.99)) if recent else (None, None)
        return {
            "requests_per_s": requests / seconds,
            "failed_per_s": failed / seconds,
            "bytes_per_s": num_bytes / seconds,
            "p50_s": p50,
            "p99_s": p99,
        }

    def _drop_old(self, now: float) -> None:
        while self._seconds and self._seconds[0][0] <= now - WINDOW_SECONDS:
            self._seconds.popleft()


def quantile(ascending: list[float], fraction: float) -> float:
    """The smallest value that is not below the given fraction of all values."""
    return ascending[max(math.ceil(fraction * len(ascending)) - 1, 0)]
