"""What Prometheus reads of builds. Kept in memory: a scrape does not wait for the queue."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from cache_service.api.builds.states import BuildProgress, State


class BuildFigures:
    """The figures of one server's builds. Labels are devices and states, never names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._rows = Counter("kdcache_build_rows", "Rows recorded.", registry=registry)
        self._bytes = Counter(
            "kdcache_build_written_bytes", "Bytes recorded, uncompressed.", registry=registry
        )
        self._ended = Counter(
            "kdcache_builds_ended", "Runs of builds that ended.", ("state",), registry=registry
        )
        self._restarts = Counter(
            "kdcache_build_worker_restarts", "Workers that died or stalled.", registry=registry
        )
        self._rate = Gauge(
            "kdcache_build_rows_per_second",
            "Rows answered by the teacher; 0 while nothing is built.",
            ("device",),
            registry=registry,
        )
        self._waiting = Gauge("kdcache_builds_queued", "Builds that wait.", registry=registry)

    def progressed(
        self, device: str, before: BuildProgress | None, progress: BuildProgress
    ) -> None:
        """Count what a worker recorded since it last told."""
        rows = progress.rows_done - (before.rows_done if before else progress.rows_done)
        written = progress.bytes_written - (before.bytes_written if before else 0)
        self._rows.inc(max(rows, 0))
        self._bytes.inc(max(written, 0))
        self._rate.labels(device).set(progress.rows_per_s)

    def restarted(self) -> None:
        """Count a worker that died or stalled."""
        self._restarts.inc()

    def ended(self, device: str, state: State) -> None:
        """Count the end of a run; `queued` where the server stops."""
        self._ended.labels(state).inc()
        self._rate.labels(device).set(0)

    def waiting(self, count: int) -> None:
        """Note how many builds wait."""
        self._waiting.set(count)
