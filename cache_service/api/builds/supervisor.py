"""The builds of a server: a queue, a lane per device, and what routes and pages ask of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import anyio
from prometheus_client import CollectorRegistry

from cache_service.api.builds.figures import BuildFigures
from cache_service.api.builds.lane import Lane
from cache_service.api.builds.process import COMMAND
from cache_service.api.builds.request import BuildRequest, build_config
from cache_service.api.builds.states import Build
from cache_service.api.builds.store import BuildStore
from cache_service.api.builds.watch import Terms
from cache_service.api.http.settings import BuildsConfig
from cache_service.errors import ConfigError, KdCacheError
from cache_service.recording.config import BuildConfig
from cache_service.recording.jobs import Shard

LOG = logging.getLogger("kdcache.builds")

FOLDER = ".kd-cache"
"""Of the server's own files below ROOT. Its name begins with a dot, so it is no cache's."""


THREADS = 4
"""Requests that ask the queue at a time: it answers one at a time, in well under a millisecond."""


class Builds:
    """See the module. Everything but `start` and `stop` may be called from any thread, and blocks
    for as long as SQLite does: not to be called on an event loop.

    Attributes:
        threads: limiter of the threads on which an event loop calls this.
    """

    def __init__(
        self,
        root: str,
        config: BuildsConfig,
        *,
        registry: CollectorRegistry | None = None,
        command: Sequence[str] = (),
    ) -> None:
        self._root = root.rstrip("/")
        self._config = config
        self._terms = Terms(
            config_of=self._config_of,
            redacted=self._redacted,
            figures=BuildFigures(registry or CollectorRegistry()),
            stall_s=config.stall_s,
            command=command or COMMAND,
        )
        self._secrets = _paths(config)
        self._store: BuildStore | None = None
        self.threads = anyio.CapacityLimiter(THREADS)
        self._lanes: list[Lane] = []

    def start(self) -> None:
        """Open the queue and take up what was left. Blocks for milliseconds.

        Raises:
            ConfigError: there is no place for the database, or it is a newer one.
            StorageError, OutOfSpaceError: it cannot be written.
        """
        path = self._database()
        self._store = BuildStore(path)
        self._store.recover()
        self._lanes = [Lane(device, self._store, self._terms) for device in self._config.devices]

    def stop(self) -> None:
        """End the workers, each with the shard at hand where that is quick. Takes under 5 s."""
        self.begin_to_stop()
        for lane in self._lanes:
            lane.join()
        self._lanes = []
        if self._store is not None:
            self._store.close()
            self._store = None

    def begin_to_stop(self) -> None:
        """Tell the workers to end. Does not block."""
        for lane in self._lanes:
            lane.stop()

    def submit(self, request: BuildRequest) -> Build:
        """Queue a build; the one that is queued or runs already where it is the same.

        Raises:
            ConfigError: not one that this server runs.
            SpecMismatchError: the cache is queued with other settings.
            QueueFullError: too many wait.
        """
        self._config_for(request, "auto")
        limits = self._config.limits
        build = self.store.submit(request, max_queued=limits.max_queued, max_kept=limits.max_kept)
        self._terms.figures.waiting(self.counts().get("queued", 0))
        for lane in self._lanes:
            lane.wake()
        return build

    def get(self, build: str) -> Build:
        """A build by id. Raises NoSuchBuildError."""
        return self.store.get(build)

    def list(self, limit: int = 100) -> Sequence[Build]:
        """Builds, the newest first."""
        return self.store.newest(limit=limit)

    def counts(self) -> dict[str, int]:
        """Number of builds by state."""
        return self.store.counts()

    def cancel(self, build: str) -> Build:
        """End a build: at once where it waits, after the shard at hand where it runs.

        Raises:
            NoSuchBuildError: there is none of that id.
        """
        canceled = self.store.cancel(build)
        self._terms.figures.waiting(self.counts().get("queued", 0))
        return canceled

    def hurry(self, cache: str, seed: int, shards: Iterable[int]) -> bool:
        """Somebody waits for shards: they come first in their build, and it before others.

        Returns whether a build that waits or runs will record them.
        """
        return self.store.await_shards(cache, [Shard(seed, shard) for shard in shards])

    def expects(self, cache: str) -> bool:
        """Whether a build that waits or runs is to record a cache; False where nobody can say."""
        try:
            return self.store.is_wanted(cache)
        except KdCacheError as problem:  # the queue's trouble must not change what is refused
            LOG.warning("whether %s is queued is not known: %s", cache, problem)
            return False

    @property
    def store(self) -> BuildStore:
        """The queue, while the server runs."""
        assert self._store is not None, "start() comes first"
        return self._store

    def _config_of(self, build: Build, device: str) -> BuildConfig:
        return self._config_for(build.request, device)

    def _config_for(self, request: BuildRequest, device: str) -> BuildConfig:
        url = f"{self._root}/{request.cache}"
        return build_config(request, self._config, cache_url=url, device=device)

    def _database(self) -> Path:
        if self._config.database is not None:
            return Path(self._config.database)
        if "://" in self._root:
            raise ConfigError(
                f"builds for {self._root} need a place on this machine for their queue.",
                hint="Set builds.database to a file.",
            )
        return Path(self._root) / FOLDER / "builds.sqlite"

    def _redacted(self, text: str) -> str:
        """Without the paths of the server's configuration: readers see errors of builds, too."""
        for secret in self._secrets:
            text = text.replace(secret, "...")
        return text.replace(f"{self._root}/", "")


def _paths(config: BuildsConfig) -> list[str]:
    """Every place that the configuration names, the longest first."""
    listed = (*config.teachers.values(), *config.datasets.values())
    # timm's names hold slashes, too, but those of files are places.
    names = [str(getattr(each, "model", None) or getattr(each, "name", "")) for each in listed]
    found = {name for name in names if ".py:" in name}
    sections: list[Any] = [each.model_dump(exclude={"model", "name"}) for each in listed]
    while sections:
        section = sections.pop()
        if isinstance(section, dict):
            sections += section.values()
        elif isinstance(section, list | tuple):
            sections += section
        elif isinstance(section, str) and "/" in section:
            found.add(section)
    return sorted(found, key=len, reverse=True)
