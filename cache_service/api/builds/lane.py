"""One device: takes builds from the queue, one at a time, and sees each to its end."""

from __future__ import annotations

import logging
import threading

from cache_service.api.builds.states import Build, BuildError
from cache_service.api.builds.store import BuildStore
from cache_service.api.builds.watch import Ended, Terms, Watch
from cache_service.errors import ConfigError, KdCacheError, StorageError

LOG = logging.getLogger("kdcache.builds")

IDLE_S = 1.0
"""How often an idle device looks for work of which nobody told it: other servers queue, too."""


UNKNOWN = BuildError(
    code="error",
    status=500,
    detail="the server failed in a way that it does not know.",
    hint="Its log has the reason; the same request resumes.",
)


class Lane:
    """A thread for one device."""

    def __init__(self, device: str, store: BuildStore, terms: Terms) -> None:
        self.device = device
        self._store = store
        self._terms = terms
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"builds {device}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There may be work."""
        self._wake.set()

    def stop(self) -> None:
        """Begin to end. The build goes back to the queue."""
        self._stopping.set()
        self._wake.set()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                self._store.recover()
                queued = self._store.counts().get("queued", 0)
                build = self._store.claim(self.device)
                self._terms.figures.waiting(queued - (build is not None))
                if build is not None:
                    self._run(build)
                    continue
            except KdCacheError as problem:  # the database: full, locked, unreachable
                LOG.warning("builds on %s: %s", self.device, problem)
            self._wake.wait(IDLE_S)
            self._wake.clear()

    def _run(self, build: Build) -> None:
        LOG.info("build %s of %s starts on %s", build.id, build.cache, self.device)
        ended = self._watched(build)
        self._terms.figures.ended(self.device, ended.state)
        LOG.info("build %s of %s: %s", build.id, build.cache, ended.state)
        while True:
            try:
                if ended.state == "queued":
                    self._store.requeue(build.id)
                else:
                    self._store.finish(build.id, ended.state, ended.error)
            except KdCacheError as problem:
                # Until this is written the build counts as running, here and after a restart.
                LOG.warning("build %s cannot be ended: %s", build.id, problem)
                if not self._stopping.wait(IDLE_S):
                    continue
            return

    def _watched(self, build: Build) -> Ended:
        try:
            config = self._terms.config_of(build, self.device)
            return Watch(build, self._store, self._terms, self._stopping).run(config)
        except ConfigError as refusal:  # the configuration has changed since it was queued
            return Ended("failed", BuildError.of(refusal))
        except OSError as problem:
            cannot = StorageError(f"no worker can be started: {problem.strerror}.")
            return Ended("failed", BuildError.of(cannot))
        except Exception:  # a fault of this program ends the build, and not the device
            LOG.exception("build %s of %s", build.id, build.cache)
            return Ended("failed", UNKNOWN)
