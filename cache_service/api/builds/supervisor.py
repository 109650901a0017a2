"""The builds of a server: the queue, a worker per device, and what routes and pages ask of them."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.to_thread
from prometheus_client import CollectorRegistry

from cache_service.api.builds.queue import Build, BuildQueue
from cache_service.api.builds.request import BuildRequest, build_config
from cache_service.api.builds.space import OutOfSpace, SpaceWatch
from cache_service.api.builds.worker import BuildMetrics, DeviceWorker, WorkerSettings
from cache_service.api.http.settings import MAX_KEPT, BuildsConfig
from cache_service.errors import ConfigError, KdCacheError, OutOfSpaceError, SpecMismatchError
from cache_service.format.spec import CacheSpec
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.pool import COMMAND
from cache_service.rows.writer import first_difference

Params = ParamSpec("Params")
Result = TypeVar("Result")

LOG = logging.getLogger("kdcache.builds")

FOLDER = ".kd-cache"
"""Of the server's own files below ROOT. No cache has such a name: they do not begin with a dot."""

THREADS = 4
"""Threads that use the queue for requests. It answers one at a time, in under a millisecond."""

MOUNTS = Path("/proc/self/mountinfo")
NETWORK_FILESYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "fuse.glusterfs")
"""Types that several machines write to."""


def network_filesystem(folder: Path) -> str | None:
    """The type of the file system that a folder lies on, or will lie on, if it is a network's."""
    if not MOUNTS.exists():  # not Linux
        return None
    resolved, depth, kind = folder.resolve(), 0, ""
    for line in MOUNTS.read_text().splitlines():
        mount, _, source = line.partition(" - ")
        point = Path(mount.split()[4].replace("\\040", " "))
        if resolved.is_relative_to(point) and len(point.parts) >= depth:  # the last one is on top
            depth, kind = len(point.parts), source.split()[0]
    return kind if kind in NETWORK_FILESYSTEMS else None


class Builds:
    """The builds of a server.

    Everything, and every method of `queue`, may be called from any thread and waits for SQLite. An
    event loop has to call it with `on_thread`.

    Attributes:
        spec_of: returns the spec of the cache of a name below the root; None if there is none.
    """

    def __init__(
        self,
        root: str,
        config: BuildsConfig,
        *,
        registry: CollectorRegistry | None = None,
        command: Sequence[str] = (),
    ) -> None:
        """Prepare; `start` opens the queue.

        Args:
            root: folder or bucket prefix of the caches.
            config: teachers, datasets and devices.
            registry: for the figures of Prometheus.
            command: starts a worker process; the real one if empty.
        """
        self.spec_of: Callable[[str], CacheSpec | None] = lambda _: None
        self._root = root.rstrip("/")
        self._config = config
        self._metrics = BuildMetrics(registry or CollectorRegistry())
        self._space = SpaceWatch(self._folders())
        self._metrics.watch(self._space)
        self._settings = WorkerSettings(
            config_of=lambda build, device: self._config_for(build.request, device),
            redact=self._redact,
            metrics=self._metrics,
            space=self._space,
            stall_s=config.stall_s,
            command=command or COMMAND,
        )
        self._private = _private_texts(config)
        self._open_queue: BuildQueue | None = None
        self._threads = anyio.CapacityLimiter(THREADS)
        self._workers: list[DeviceWorker] = []

    def check(self) -> None:
        """Check that builds can write and that the queue opens, before anything is served.

        Raises:
            ConfigError, StorageError, OutOfSpaceError: they cannot.
        """
        places = {"root": Path(self._root)} if "://" not in self._root else {}
        places["builds.database"] = self._database().parent
        for what, folder in places.items():
            existing = next(each for each in (folder, *folder.parents) if each.exists())
            if not os.access(existing, os.W_OK | os.X_OK):
                raise ConfigError(
                    f"builds need to write, and {existing} ({what}) cannot be written.",
                    hint="Serve without `builds`, or make that folder writable for this user.",
                )
        network = network_filesystem(places["builds.database"])
        if network is not None:
            raise ConfigError(
                f"the queue of the builds ({self._database()}, builds.database) lies on {network}: "
                "SQLite needs a disk of this machine, which no server on another one writes to.",
                hint="Set builds.database to a file on a local disk.",
            )
        BuildQueue(self._database()).close()

    def start(self) -> None:
        """Open the queue and continue what is in it. Takes milliseconds.

        Raises:
            ConfigError: there is no place for the database, or a newer version created it.
            StorageError, OutOfSpaceError: it cannot be written.
        """
        self._open_queue = queue = BuildQueue(self._database())
        queue.recover()
        self._workers = [
            DeviceWorker(device, queue, self._settings) for device in self._config.devices
        ]

    def stop(self) -> None:
        """End the workers, each after its present shard if that is quick. Takes under 5 s."""
        self.begin_to_stop()
        for worker in self._workers:
            worker.join()
        self._workers = []
        if self._open_queue is not None:
            self._open_queue.close()
            self._open_queue = None

    def begin_to_stop(self) -> None:
        """Tell the workers to end. Does not wait."""
        for worker in self._workers:
            worker.begin_to_stop()

    @property
    def queue(self) -> BuildQueue:
        """The queue, between `start` and `stop`."""
        assert self._open_queue is not None, "call start() first"
        return self._open_queue

    async def on_thread(
        self, call: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs
    ) -> Result:
        """Call a method without blocking the event loop, on threads that no reader needs."""
        return await anyio.to_thread.run_sync(
            functools.partial(call, *args, **kwargs), limiter=self._threads
        )

    def submit(self, request: BuildRequest) -> Build:
        """Queue a build. An equal build that waits or runs is returned instead.

        Raises:
            ConfigError: this server does not run such a build.
            SpecMismatchError: the cache is queued or recorded with other settings.
            QueueFullError: too many builds wait.
        """
        self._refuse_taken(request, self._config_for(request, "auto"))
        try:
            build = self.queue.submit(
                request, max_queued=self._config.max_queued, max_kept=MAX_KEPT
            )
        except OutOfSpaceError as problem:
            self._space.note_full(problem.message)
            raise
        self._metrics.set_queued(self.queue.counts().get("queued", 0))
        for worker in self._workers:
            worker.wake()
        return build

    def cancel(self, build: str) -> Build:
        """End a build: at once if it waits, after its present shard if it runs.

        Raises:
            NoSuchBuildError: there is none of that id.
        """
        canceled = self.queue.cancel(build)
        self._metrics.set_queued(self.queue.counts().get("queued", 0))
        return canceled

    def out_of_space(self) -> OutOfSpace | None:
        """Since when builds lack space, from what happened to them; None if they do not."""
        return self._space.state()

    def out_of_space_since(self) -> float | None:
        """The same as a Unix time only."""
        shortage = self._space.state()
        return None if shortage is None else shortage.since_s

    def place(self, cache: str, seed: int | None = None) -> str | None:
        """Where the build is that will record a cache, in a sentence; None if none is known."""
        try:
            place = self.queue.place(cache, seed)
        except KdCacheError as problem:  # an error of the queue must not change what is refused
            LOG.warning("whether %s is queued is not known: %s", cache, problem)
            return None
        return None if place is None else str(place)

    def _refuse_taken(self, request: BuildRequest, config: BuildConfig) -> None:
        """Raise SpecMismatchError if a cache of that name was recorded with other settings.

        Only what needs neither teacher nor dataset is compared; the build itself compares all.
        """
        recorded = self.spec_of(request.cache)
        if recorded is None:
            return
        codec = config.codec.model_dump(mode="json")
        requested: dict[str, Any] = {
            "recipe": config.augment.recipe().model_dump(mode="json"),
            "scales": list(config.scales),
            # The teacher's head decides the number of channels.
            "codec": {name: value for name, value in codec.items() if name != "num_channels"},
        }
        if config.layout is not None:
            requested["layout"] = config.layout.model_dump(mode="json")
        if ".py:" not in config.teacher.model + recorded.teacher.model:
            requested["teacher"] = {"model": config.teacher.model}
        known = recorded.model_dump(mode="json")
        for field, value in requested.items():
            present = known[field]
            if isinstance(value, dict):
                present = {name: present.get(name) for name in value}
            difference = first_difference(value, present, field)
            if difference is not None:
                where, now, before = difference
                raise SpecMismatchError(
                    f"cache {request.cache} was recorded with {where} = {json.dumps(before)}, but "
                    f"this request has {where} = {json.dumps(now)}.",
                    hint="Name another cache, or change the setting back.",
                )

    def _config_for(self, request: BuildRequest, device: str) -> BuildConfig:
        url = f"{self._root}/{request.cache}"
        return build_config(request, self._config, cache_url=url, device=device)

    def _folders(self) -> list[Path]:
        """Where builds write, as far as that is on this machine."""
        folders = [Path(self._root)] if "://" not in self._root else []
        if self._config.database is not None:
            folders.append(Path(self._config.database).parent)
        return folders

    def _database(self) -> Path:
        if self._config.database is not None:
            return Path(self._config.database)
        if "://" in self._root:
            raise ConfigError(
                f"builds for {self._root} need a file on this machine for their queue.",
                hint="Set builds.database to a file.",
            )
        return Path(self._root) / FOLDER / "builds.sqlite"

    def _redact(self, text: str) -> str:
        """Remove the paths of the server's configuration: clients see the errors of builds."""
        for private in self._private:
            text = text.replace(private, "...")
        return text.replace(f"{self._root}/", "")


def _private_texts(config: BuildsConfig) -> list[str]:
    """Every path in the configuration, the longest first."""
    listed = (*config.teachers.values(), *config.datasets.values())
    # Names of timm hold slashes, too, and are public; names of files are not.
    names = [str(getattr(each, "model", None) or getattr(each, "name", "")) for each in listed]
    paths = {name for name in names if ".py:" in name}
    sections: list[Any] = [each.model_dump(exclude={"model", "name"}) for each in listed]
    while sections:
        section = sections.pop()
        if isinstance(section, dict):
            sections += section.values()
        elif isinstance(section, list | tuple):
            sections += section
        elif isinstance(section, str) and "/" in section:
            paths.add(section)
    return sorted(paths, key=len, reverse=True)
