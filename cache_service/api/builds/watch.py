"""One build while it runs: news in, awaited shards out, and what is done when its worker dies."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cache_service.api.builds.figures import BuildFigures
from cache_service.api.builds.process import COMMAND, Worker
from cache_service.api.builds.states import Build, BuildError, BuildProgress, State
from cache_service.api.builds.store import BuildStore
from cache_service.errors import KdCacheError
from cache_service.recording.config import BuildConfig

LOG = logging.getLogger("kdcache.builds")

MAX_RESTARTS = 3
"""Deaths of a build's worker without a committed shard in between: then something is wrong."""

START_S = 600.0
"""What a worker gets for loading dataset and teacher before its first news."""

POLL_S = 0.1
"""How often a worker is looked after: what awaited shards and cancellations wait at most."""

NOTE_S = 0.5
"""Least time between two notes of progress in the database, each of which is an fsync."""

CANCEL_S = 20.0
"""What a canceled worker gets for the shard that it is writing."""

STOP_S = 3.0
"""What it gets when the server ends; the next server resumes."""


class Terms(NamedTuple):
    """What is the same for every build of a server.

    Attributes:
        config_of: the build file of a build on a device; raises ConfigError.
        redacted: a text without what the server's configuration keeps to itself.
        figures: for Prometheus.
        stall_s: a worker without news for so long is replaced.
        command: what starts a worker.
    """

    config_of: Callable[[Build, str], BuildConfig]
    redacted: Callable[[str], str]
    figures: BuildFigures
    stall_s: float
    command: Sequence[str] = COMMAND


class Ended(NamedTuple):
    """The state that a build is left in, and why it failed."""

    state: State
    error: BuildError | None = None


class Watch:
    """One run of one build, through the deaths of its workers."""

    def __init__(
        self, build: Build, store: BuildStore, terms: Terms, stopping: threading.Event
    ) -> None:
        self._build = build
        self._store = store
        self._terms = terms
        self._stopping = stopping
        self._deaths = 0
        self._shards_done = 0
        self._device = build.device or ""
        self._noted = 0.0
        self._latest: BuildProgress | None = None
        self._unwritten: BuildProgress | None = None

    def run(self, config: BuildConfig) -> Ended:
        """Start workers until one ends the build. Raises OSError where none can be started."""
        while True:
            worker = Worker(config.model_dump_json(), command=self._terms.command)
            self._latest, self._asked, self._told = None, 0, 0.0
            try:
                ended = self._follow(worker)
            finally:
                worker.kill()
            self._note(now=True)
            if ended is not None:
                return ended

    def _follow(self, worker: Worker) -> Ended | None:
        """Look after one worker until it has ended. None: start another one."""
        while True:
            status = worker.exit_status()
            for news in worker.news():
                if "done" in news:
                    return Ended("done")
                if "error" in news:
                    return Ended("failed", self._redacted(BuildError(**news["error"])))
                self._take(BuildProgress(**news["progress"]))
            if self._told:
                if status is not None or time.monotonic() > self._told:
                    return Ended("canceled" if self._canceling() else "queued")
            elif self._stopping.is_set() or self._canceling():
                worker.terminate()
                patience = STOP_S if self._stopping.is_set() else CANCEL_S
                self._told = time.monotonic() + patience
            elif status is not None:
                return self._died(status, worker.last_line())
            elif self._stalled(worker):
                return self._died(0, f"no news for {self._terms.stall_s:g} s")
            self._note()
            self._forward(worker)
            if status is None:
                time.sleep(POLL_S)

    def _take(self, progress: BuildProgress) -> None:
        # Not `shards_committed`: death may outrun the news of a commit.
        if progress.shards_done > self._shards_done:
            self._deaths, self._shards_done = 0, progress.shards_done
        self._terms.figures.progressed(self._device, self._latest, progress)
        self._latest = self._unwritten = progress

    def _died(self, status: int, last_line: str) -> Ended | None:
        """A worker that was killed is replaced; one that failed would fail again."""
        self._deaths += 1
        self._terms.figures.restarted()
        why = f"status {status}" if status > 0 else f"signal {-status}" if status else "stalled"
        LOG.warning("worker of build %s ended (%s): %s", self._build.id, why, last_line)
        if status <= 0 and self._deaths <= MAX_RESTARTS:
            return None
        many = f"died {self._deaths} times without recording a shard ({why})"
        error = BuildError(
            code="worker_failed",
            status=500,
            detail=f"the worker {'failed' if status > 0 else many}: {last_line or 'no word'}",
            hint="The server's log has more; the same request resumes.",
        )
        return Ended("failed", self._redacted(error))

    def _stalled(self, worker: Worker) -> bool:
        patience = self._terms.stall_s
        if self._latest is None:
            patience = max(START_S, patience)
        return time.monotonic() - worker.heard > patience

    def _canceling(self) -> bool:
        try:
            return self._store.get(self._build.id).canceling
        except KdCacheError as problem:  # asked again in a moment
            LOG.warning("build %s: %s", self._build.id, problem)
            return False

    def _forward(self, worker: Worker) -> None:
        """Tell the worker which shards somebody waits for."""
        try:
            awaited = self._store.awaited(self._build.id, after=self._asked)
        except KdCacheError as problem:
            LOG.warning("build %s: %s", self._build.id, problem)
            return
        if awaited:
            worker.front([shard for _, shard in awaited])
            self._asked = awaited[-1][0]

    def _note(self, *, now: bool = False) -> None:
        """Store progress, now and then. Where the database is full it is lost: nothing needs it."""
        if self._unwritten is None or not (now or time.monotonic() - self._noted > NOTE_S):
            return
        try:
            self._store.note(self._build.id, self._unwritten)
        except KdCacheError as problem:
            LOG.warning("build %s: %s", self._build.id, problem)
        self._noted, self._unwritten = time.monotonic(), None

    def _redacted(self, error: BuildError) -> BuildError:
        words = {name: self._terms.redacted(getattr(error, name)) for name in ("detail", "hint")}
        return error.model_copy(update=words)
