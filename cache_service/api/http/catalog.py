"""The caches below the root of a service: found by name, opened once, reopened when replaced."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cachetools import LRUCache, TTLCache
from numpy.typing import NDArray

from cache_service.api.http.damage import DamageLog
from cache_service.api.http.mapped import MappedObject, StoredT
from cache_service.errors import (
    ConfigError,
    CorruptError,
    KdCacheError,
    NotACacheError,
    RowsNotBuiltError,
    StorageError,
)
from cache_service.format.codecs import Arrays
from cache_service.format.commit import commit_key
from cache_service.format.group import ROOT_KEY
from cache_service.format.shard import REPAIR
from cache_service.format.spec import CacheSpec
from cache_service.rows.reader import Cache, open_stored
from cache_service.storage import Storage, open_storage
from cache_service.storage.retries import NO_RETRIES
from cache_service.views.order import epoch_order, positions_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)

MAX_OPEN = 64
"""Caches kept open. Opening one costs a few small reads."""

MAX_MAPPED = 256
"""Stored objects of a cache that stay mapped for requests by their keys."""

COMMITS_TTL_S = 1.0
"""How long a listing of a cache's commits is reused, seconds: it reads a folder per seed."""

BUCKET_TTL_S = 5.0
"""How long the root document of a cache in a bucket is reused, seconds."""


START_S = 3.0
"""How long the start waits for a bucket, seconds."""


class CacheAwaitedError(RowsNotBuiltError):
    """A build of the cache is queued or has just started: none of it is recorded yet."""

    http_status = 503
    retry_after_s = 2


class OpenCache:
    """One open cache and what is known of it for a moment. Safe to share between threads.

    Attributes:
        name: below the root; messages have it in place of the path.
        cache: to read from.
        stamp: changes when another cache takes this one's place.
    """

    def __init__(self, name: str, cache: Cache, stamp: object, folder: Path | None) -> None:
        self.name = name
        self.cache = cache
        self.stamp = stamp
        self._folder = folder
        self._commits: tuple[float, dict[int, list[int]]] | None = None
        self._complete: set[int] = set()
        self._planned_positions: tuple[int, NDArray[np.int32]] | None = None
        self._lock = threading.Lock()
        self._mapped: LRUCache[str, MappedObject[Any]] = LRUCache(MAX_MAPPED)

    def commits(self) -> dict[int, list[int]]:
        """Recorded shards by seed, at most a second old."""
        known, now = self._commits, time.monotonic()
        if known is not None and now - known[0] < COMMITS_TTL_S:
            return known[1]
        found = self.cache.commits()
        self._commits = (now, found)
        return found

    def is_lookup_ready(
        self, seed: int, samples: NDArray[np.int64], names: tuple[str, ...]
    ) -> bool:
        """Whether `lookup` would not block on storage."""
        return seed in self._complete and self.cache.is_lookup_ready(seed, samples, names)

    def lookup(self, seed: int, samples: NDArray[np.int64], names: tuple[str, ...]) -> Arrays:
        """Encoded rows of samples, in request order. Raises as `Cache.lookup`.

        While a seed is being recorded, the positions of samples are computed from the seed, so that
        nothing is searched. For a complete seed, the order that was recorded counts.
        """
        if self._is_complete(seed):
            return self.cache.lookup(seed, samples, arrays=names)
        self.cache.check_samples(samples)
        with_sample = tuple({"sample": None, **dict.fromkeys(names)})
        rows = self.cache.gather(seed, self._planned(seed, samples), arrays=with_sample)
        if np.array_equal(rows["sample"], samples):
            return {name: rows[name] for name in names}
        return self.cache.lookup(seed, samples, arrays=names)

    def _is_complete(self, seed: int) -> bool:
        if seed in self._complete:
            return True
        if len(self.commits().get(seed, [])) < self.cache.spec.num_shards:
            return False
        self._complete.add(seed)
        return True

    def _planned(self, seed: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        with self._lock:
            if self._planned_positions is None or self._planned_positions[0] != seed:
                order = epoch_order(self.cache.spec.dataset.num_samples, seed)
                self._planned_positions = (seed, positions_of(order))
            return self._planned_positions[1][samples].astype(np.int64)

    def shards_of_samples(self, seed: int, samples: NDArray[np.int64]) -> list[int]:
        """Return the shards in which the samples are, or will be, recorded."""
        if samples.max() >= self.cache.spec.dataset.num_samples:
            return []
        positions = self._planned(seed, samples)
        return sorted(set((positions // self.cache.spec.layout.shard_rows).tolist()))

    def refuse_links(self, key: str) -> None:
        """Refuse an object that a symbolic link puts outside of the cache.

        Raises:
            CorruptError: it is such a link. No writer of this project creates links.
        """
        folder = self._folder
        if folder is not None and not (folder / key).resolve().is_relative_to(folder):
            raise CorruptError(f"{self.name}/{key} is a link that leaves the cache.", hint=REPAIR)

    def mapped_object(self, key: str) -> MappedObject[Any] | None:
        """A stored object that was mapped before and is still the same; None otherwise."""
        with self._lock:
            mapped = self._mapped.get(key)
        return mapped if mapped is not None and mapped.is_current() else None

    def map_object(self, key: str, stored: StoredT) -> MappedObject[StoredT] | None:
        """Map an object, which was just found to be whole; None where it cannot be mapped."""
        content = None if self._folder is None else self.cache.storage.map(key)
        if content is None or self._folder is None:
            return None
        mapped = MappedObject(stored, self._folder / key, content)
        with self._lock:
            self._mapped[key] = mapped
        return mapped

    def has_commits(self, seed: int, shards: Sequence[int]) -> bool:
        """Whether all of these shards are recorded, as of now."""
        storage = self.cache.storage
        return all(storage.size(commit_key(seed, shard)) is not None for shard in shards)


class Catalog:
    """All caches of a service.

    Attributes:
        place: returns where the build is that will record a cache (and a seed of it), in a
            sentence; None if there is none.
        damage: what reading has found damaged.

    Raises:
        ConfigError: the folder does not exist, or the URL has an unsupported scheme.
    """

    def __init__(self, root: str, *, open_shards: int) -> None:
        self._root = _open_root(root)
        self.place: Callable[[str, int | None], str | None] = lambda _cache, _seed: None
        self.damage = DamageLog(self.changed_s)
        self._open_shards = open_shards
        self._opened: LRUCache[str, OpenCache] = LRUCache(MAX_OPEN)
        self._lock = threading.Lock()

    def check(self) -> None:
        """List the root. Raises StorageError or OSError if that is not possible."""
        self._root.names()

    def names(self) -> list[str]:
        """Names of the caches, sorted.

        Raises:
            StorageError: the root cannot be listed.
        """
        return [name for name in self._root.names() if self._root.stamp(name) is not None]

    def changed_s(self, name: str) -> float | None:
        """When a cache was created or a shard of it committed last, Unix time; None if unknown."""
        return self._root.changed_s(name)

    def if_open(self, name: str) -> OpenCache | None:
        """The cache of that name if it is open and still the same; None if only storage knows."""
        if not self._root.is_quick:
            return None
        with self._lock:
            opened = self._opened.get(name)
        if opened is None or opened.stamp != self._root.stamp(name):
            return None
        return opened

    def spec_of(self, name: str) -> CacheSpec | None:
        """The spec of the cache of that name; None if there is none that can be opened."""
        try:
            return self.open(name).cache.spec
        except KdCacheError:
            return None

    def open(self, name: str) -> OpenCache:
        """The cache of that name.

        Raises:
            NotACacheError: there is none.
            CacheAwaitedError: a build is about to create it.
            CorruptError: its metadata is damaged.
        """
        stamp = self._root.stamp(name) if NAME.fullmatch(name) else None
        if stamp is None:
            place = self.place(name, None) if NAME.fullmatch(name) else None
            if place is not None:
                raise CacheAwaitedError(
                    f"cache {name!r} is not recorded yet. {place}",
                    hint="Ask again, or set wait_s in the train file. GET /v1/builds shows its "
                    "progress.",
                )
            raise _no_such_cache(name)
        with self._lock:
            opened = self._opened.get(name)
        if opened is not None and opened.stamp == stamp:
            return opened
        try:
            cache = open_stored(self._root.storage(name), open_shards=self._open_shards)
        except CorruptError as damage:
            self.damage.note(name, damage)
            raise
        opened = OpenCache(name, cache, stamp, self._root.folder(name))
        with self._lock:
            self._opened[name] = opened
        return opened


class _Folder:
    """A local root. Symbolic links that leave it are not followed.

    Attributes:
        is_quick: whether `stamp` takes microseconds and no request to a bucket.
    """

    is_quick = True

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        if not self._path.is_dir():
            raise ConfigError(
                f"{path} is not a folder.", hint="Name the folder that your caches lie in."
            )
        self._real = self._path.resolve()
        if (self._path / ROOT_KEY).is_file():
            raise _a_cache_itself(path)

    def names(self) -> list[str]:
        """Names of possible caches, sorted."""
        found = (path.name for path in self._path.iterdir() if NAME.fullmatch(path.name))
        return sorted(name for name in found if self._is_inside(name))

    def stamp(self, name: str) -> object:
        """Equal as long as the same cache lies there; None if there is none."""
        try:
            found = os.stat(f"{self._path}/{name}/{ROOT_KEY}")  # noqa: PTH116  twice as fast
        except OSError:
            return None
        return (found.st_ino, found.st_size, found.st_mtime_ns)

    def changed_s(self, name: str) -> float | None:
        """The newest change of its root document and of its folders of commits."""
        folder = self._path / name
        times = []
        with suppress(OSError):
            times.append((folder / ROOT_KEY).stat().st_mtime)
            times += [each.stat().st_mtime for each in os.scandir(folder / "commits")]
        return max(times, default=None)

    def storage(self, name: str) -> Storage:
        if not self._is_inside(name):
            raise _no_such_cache(name)
        storage = open_storage(str(self._path / name))
        storage.url = name  # errors go to clients, and the path is the operator's
        return storage

    def folder(self, name: str) -> Path | None:
        """The real path of a cache on this machine."""
        return (self._path / name).resolve()

    def _is_inside(self, name: str) -> bool:
        return (self._path / name / ROOT_KEY).resolve().is_relative_to(self._real)


_UNKNOWN = object()


class _Bucket:
    """As `_Folder`, in an object store, where every access costs a request."""

    is_quick = False

    def __init__(self, url: str) -> None:
        from cache_service.storage.objects import ObjectStorage

        self._url = url.rstrip("/")
        # In an outage clients get 503, and repeat the request.
        self._open = partial(ObjectStorage, retries=NO_RETRIES)
        self._storage = self._open(self._url, name="the root")
        # Names are the client's choice, so their number is bounded.
        self._stamps: TTLCache[str, bytes | None] = TTLCache(2 * MAX_OPEN, ttl=BUCKET_TTL_S)
        self._lock = threading.Lock()
        if self._is_cache_itself():
            raise _a_cache_itself(self._url)

    def _is_cache_itself(self) -> bool:
        """False if the bucket does not answer soon: it may be up later, and `/readyz` tells."""
        found: list[object] = []

        def look() -> None:
            with suppress(StorageError):
                found.append(self._storage.get(ROOT_KEY))

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        looking.join(START_S)
        return any(content is not None for content in found)

    def names(self) -> list[str]:
        return [name for name in self._storage.folders() if NAME.fullmatch(name)]

    def stamp(self, name: str) -> object:
        with self._lock:
            known = self._stamps.get(name, _UNKNOWN)
        if known is not _UNKNOWN:
            return known
        content = self._storage.get(f"{name}/{ROOT_KEY}")
        with self._lock:
            self._stamps[name] = content
        return content

    def changed_s(self, name: str) -> float | None:  # noqa: ARG002  one signature for both
        return None

    def storage(self, name: str) -> Storage:
        return self._open(f"{self._url}/{name}", name=name)

    def folder(self, name: str) -> Path | None:  # noqa: ARG002  one signature for both
        return None


def _a_cache_itself(root: str) -> ConfigError:
    above = root.rstrip("/").rpartition("/")[0]
    return ConfigError(
        f"{root} is a cache itself; `kd-cache serve` takes a folder of caches.",
        hint=f"kd-cache serve {above or '..'}",
    )


def _no_such_cache(name: str) -> NotACacheError:
    return NotACacheError(
        f"there is no cache {name[:128]!r} here.", hint="GET /v1/caches lists them."
    )


def _open_root(root: str) -> _Folder | _Bucket:
    scheme, found, rest = root.partition("://")
    if not found:
        return _Folder(root)
    if scheme == "file":
        return _Folder(rest)
    if scheme in ("s3", "gs", "az"):
        try:
            return _Bucket(root)
        except ImportError as missing:
            raise ConfigError(
                f"cannot serve {root}: obstore is not installed.", hint="pip install 'kd-cache[s3]'"
            ) from missing
    raise ConfigError(
        f"cannot serve {root}: it is neither a folder nor a bucket.",
        hint="Use a path, s3://bucket/prefix, gs:// or az://.",
    )
