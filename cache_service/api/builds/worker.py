"""A device of the server: takes builds from the queue, one at a time, and runs each to its end.

The recording itself happens in a process of its own (`cache_service.recording.worker`), so that the
server never loads torch and survives whatever happens to a build.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge

from cache_service.api.builds.queue import Build, BuildError, BuildProgress, BuildQueue, State
from cache_service.api.builds.space import RepeatedWarning, SpaceWatch
from cache_service.errors import ConfigError, KdCacheError, OutOfSpaceError, StorageError
from cache_service.processes import ChildProcess, Report, Supervisor
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.pool import COMMAND, job_message, start_worker

LOG = logging.getLogger("kdcache.builds")

IDLE_S = 1.0
"""How often an idle device looks for builds: other servers may queue some without notice."""

POLL_S = 0.1
"""How often a worker process is checked. Prioritized shards and cancellations wait as long."""

STORE_S = 0.5
"""Least time between two writes of progress to the database, each of which is an fsync."""

CANCEL_S = 20.0
"""Time for the worker of a canceled build to finish the shard that it is writing."""

STOP_S = 3.0
"""The same when the server stops. The next server resumes the build."""

UNEXPECTED = BuildError(
    code="error",
    status=500,
    detail="the server failed unexpectedly.",
    hint="Its log has the reason; the same request resumes.",
)


class BuildMetrics:
    """Prometheus figures of one server's builds. Labels are devices and states, never names.

    They are kept in memory, so that a scrape does not wait for the database.
    """

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
        self._queued = Gauge("kdcache_builds_queued", "Builds that wait.", registry=registry)
        self._running = Gauge("kdcache_builds_running", "Builds that run.", registry=registry)
        self._registry = registry

    def watch(self, space: SpaceWatch) -> None:
        """Show free bytes, and whether they are too few, as they are at each scrape."""
        Gauge(
            "kdcache_builds_free_bytes", "Free bytes where builds write.", registry=self._registry
        ).set_function(space.free_bytes)
        Gauge(
            "kdcache_builds_out_of_space_since_seconds",
            "Unix time since when builds lack space; 0 if they do not.",
            registry=self._registry,
        ).set_function(lambda: shortage.since_s if (shortage := space.state()) else 0)

    def count_start(self) -> None:
        """Count the start of a run."""
        self._running.inc()

    def count_progress(
        self, device: str, before: BuildProgress | None, progress: BuildProgress
    ) -> None:
        """Count what a worker process recorded between two of its reports."""
        rows = progress.rows_done - (before.rows_done if before else progress.rows_done)
        written = progress.bytes_written - (before.bytes_written if before else 0)
        self._rows.inc(max(rows, 0))
        self._bytes.inc(max(written, 0))
        self._rate.labels(device).set(progress.rows_per_s)

    def count_restart(self) -> None:
        """Count a worker process that died or stalled."""
        self._restarts.inc()

    def count_end(self, device: str, state: State) -> None:
        """Count the end of a run; its state is `queued` if the server stops."""
        self._running.dec()
        self._ended.labels(state).inc()
        self._rate.labels(device).set(0)

    def set_queued(self, count: int) -> None:
        """Set how many builds wait."""
        self._queued.set(count)


class WorkerSettings(NamedTuple):
    """What is the same for every build of a server.

    Attributes:
        config_of: the build file of a build on a device; raises ConfigError.
        redact: removes from a text what the server's configuration keeps private.
        metrics: for Prometheus.
        space: learns whether shards and states could be written.
        stall_s: a worker process that is silent for so long is replaced, seconds.
        command: starts a worker process.
    """

    config_of: Callable[[Build, str], BuildConfig]
    redact: Callable[[str], str]
    metrics: BuildMetrics
    space: SpaceWatch
    stall_s: float
    command: Sequence[str] = COMMAND


class DeviceWorker:
    """A thread that runs the builds of one device."""

    def __init__(self, device: str, queue: BuildQueue, settings: WorkerSettings) -> None:
        self.device = device
        self._queue = queue
        self._settings = settings
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._warn = RepeatedWarning()
        self._thread = threading.Thread(target=self._work, name=f"builds {device}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look for a build now."""
        self._wake.set()

    def begin_to_stop(self) -> None:
        """Give the present build back to the queue, and take no other. Does not wait."""
        self._stopping.set()
        self._wake.set()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                self._queue.recover()
                queued = self._queue.counts().get("queued", 0)
                build = self._queue.claim(self.device)
                self._settings.metrics.set_queued(queued - (build is not None))
                if build is not None:
                    self._run(build)
                    continue
            except KdCacheError as problem:  # the database is full, locked or unreachable
                self._note(problem)
                self._warn(f"builds on {self.device}: {problem}")
            self._settings.space.remind()
            self._wake.wait(IDLE_S)
            self._wake.clear()

    def _note(self, problem: KdCacheError) -> None:
        if isinstance(problem, OutOfSpaceError):
            self._settings.space.note_full(problem.message)

    def _run(self, build: Build) -> None:
        LOG.info("build %s of %s starts on %s", build.id, build.cache, self.device)
        self._settings.metrics.count_start()
        outcome = self._outcome(build)
        self._settings.metrics.count_end(self.device, outcome.state)
        self._log_end(build, outcome)
        while True:
            try:
                if outcome.state == "queued":
                    self._queue.requeue(build.id)
                else:
                    self._queue.finish(build.id, outcome.state, outcome.error)
            except KdCacheError as problem:
                # Until this is written the database says that the build runs, also after a restart.
                self._note(problem)
                self._warn(f"the end of build {build.id} cannot be stored: {problem}")
                self._settings.space.remind()
                if not self._stopping.wait(IDLE_S):
                    continue
            return

    def _log_end(self, build: Build, outcome: Outcome) -> None:
        error = outcome.error
        if error is None:
            LOG.info("build %s of %s: %s", build.id, build.cache, outcome.state)
            return
        if error.code == OutOfSpaceError.code:
            self._settings.space.note_full(error.detail)
        fields = {"build": build.id, "cache": build.cache, **error.model_dump()}
        LOG.error(
            "build %s of %s failed: %s",
            build.id,
            build.cache,
            f"error[{error.code}] {error.detail} {error.hint}".strip(),
            extra={"fields": fields},
        )

    def _outcome(self, build: Build) -> Outcome:
        try:
            config = self._settings.config_of(build, self.device)
            return _BuildRun(build, self._queue, self._settings, self._stopping).run(config)
        except ConfigError as refusal:  # the configuration has changed since the build was queued
            return _failed(refusal)
        except OSError as problem:
            return _failed(StorageError(f"no worker can be started: {problem.strerror}."))
        except Exception:  # an error of this program ends the build, and the device continues
            LOG.exception("build %s of %s", build.id, build.cache)
            return Outcome("failed", UNEXPECTED)


class Outcome(NamedTuple):
    """The state that a run leaves its build in, and why it failed."""

    state: State
    error: BuildError | None = None


def _failed(refusal: KdCacheError) -> Outcome:
    return Outcome("failed", BuildError(**refusal.as_document()))


class _BuildRun:
    """One run of one build, through the restarts of its worker process."""

    def __init__(
        self,
        build: Build,
        queue: BuildQueue,
        settings: WorkerSettings,
        stopping: threading.Event,
    ) -> None:
        self._build = build
        self._queue = queue
        self._settings = settings
        self._stopping = stopping
        self._latest: BuildProgress | None = None
        self._unstored: BuildProgress | None = None
        self._stored_s = 0.0
        self._last_prioritized = 0
        self._end_by_s: float | None = None
        self._warn = RepeatedWarning()

    def run(self, config: BuildConfig) -> Outcome:
        """Run the build to its end. Raises OSError if no process can be started."""
        job = job_message(config, config.seeds)
        supervisor = Supervisor(
            lambda: start_worker(job, command=self._settings.command, log=LOG),
            stall_s=self._settings.stall_s,
        )
        try:
            while (outcome := self._check(supervisor)) is None:
                time.sleep(POLL_S)
        finally:
            supervisor.process.kill()
        self._store_progress(now=True)
        return outcome

    def _check(self, supervisor: Supervisor) -> Outcome | None:
        """Take in messages, pass on wishes, and react to a failure. None while the build runs."""
        report, process = supervisor.report(), supervisor.process
        for message in report.messages:
            if "done" in message:
                return Outcome("done")
            if "error" in message:
                return Outcome("failed", self._redact(BuildError(**message["error"])))
            self._take(message["progress"], supervisor)
        if self._end_by_s is not None:
            if report.status is not None or time.monotonic() > self._end_by_s:
                return Outcome("canceled" if self._is_canceling() else "queued")
        elif self._stopping.is_set() or self._is_canceling():
            process.terminate()
            grace_s = STOP_S if self._stopping.is_set() else CANCEL_S
            self._end_by_s = time.monotonic() + grace_s
        elif report.failure is not None:
            return self._replace(supervisor, report)
        self._store_progress()
        self._send_prioritized(process)
        return None

    def _take(self, document: dict[str, Any], supervisor: Supervisor) -> None:
        latest_shard = ("seed", "shard")
        progress = BuildProgress(**{k: v for k, v in document.items() if k not in latest_shard})
        supervisor.note_progress(progress.shards_done)
        self._settings.metrics.count_progress(self._build.device or "", self._latest, progress)
        before = self._latest.shards_committed if self._latest else 0
        if progress.shards_committed > before:
            self._settings.space.note_written()
        self._latest = self._unstored = progress

    def _replace(self, supervisor: Supervisor, report: Report) -> Outcome | None:
        """Replace a process that was killed or stalled. One that failed would fail again."""
        last_line = supervisor.process.last_line()
        LOG.warning("worker of build %s: %s: %s", self._build.id, report.failure, last_line)
        self._settings.metrics.count_restart()
        self._store_progress(now=True)
        self._latest, self._last_prioritized = None, 0
        if report.status is not None and report.status > 0:
            reason = "the worker failed"
        elif supervisor.restart():
            return None
        else:
            reason = (
                f"the worker died {supervisor.deaths} times without recording a shard "
                f"({report.failure})"
            )
        error = BuildError(
            code="worker_failed",
            status=500,
            detail=f"{reason}: {last_line or 'it wrote no message'}",
            hint="The server's log has more; the same request resumes.",
        )
        return Outcome("failed", self._redact(error))

    def _is_canceling(self) -> bool:
        try:
            return self._queue.get(self._build.id).canceling
        except KdCacheError as problem:  # the next check asks again
            self._warn(f"build {self._build.id}: {problem}")
            return False

    def _send_prioritized(self, process: ChildProcess) -> None:
        """Send the worker those shards that somebody waits for."""
        try:
            new = self._queue.prioritized(self._build.id, after=self._last_prioritized)
        except KdCacheError as problem:
            self._warn(f"build {self._build.id}: {problem}")
            return
        if new:
            process.send({"prioritize": [shard for _, shard in new]})
            self._last_prioritized = new[-1][0]

    def _store_progress(self, *, now: bool = False) -> None:
        """Store progress now and then. It is dropped if the database is full: nothing needs it."""
        due = now or time.monotonic() - self._stored_s > STORE_S
        if self._unstored is None or not due:
            return
        try:
            self._queue.set_progress(self._build.id, self._unstored)
        except KdCacheError as problem:
            self._warn(f"build {self._build.id}: {problem}")
        self._stored_s, self._unstored = time.monotonic(), None

    def _redact(self, error: BuildError) -> BuildError:
        texts = {name: self._settings.redact(getattr(error, name)) for name in ("detail", "hint")}
        return error.model_copy(update=texts)
