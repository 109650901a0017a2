"""The caches below the root of a service: found by name, opened once, opened anew when replaced."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import ConfigError, CorruptError, NotACacheError, RowsNotBuiltError
from cache_service.format.commit import commit_key
from cache_service.format.group import ROOT_KEY
from cache_service.format.shard import REPAIR
from cache_service.reader import Cache, open_stored
from cache_service.reader_memory import NotAtHandError, Rows
from cache_service.storage import Storage, open_storage
from cache_service.views.order import epoch_order, positions_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)

MAX_OPEN = 64
"""Caches kept open. Opening one costs a few small reads."""

COMMITS_TTL_S = 1.0
"""A listing of a cache's commits is taken for true so long: it reads a folder per seed."""

BUCKET_TTL_S = 5.0
"""A bucket's root documents are taken for true so long."""


class CacheAwaitedError(RowsNotBuiltError):
    """A build of the cache is queued or begins: none of it is there yet."""

    http_status = 503
    retry_after_s = 2


class Served:
    """One open cache and what is known of it for a moment. Safe to share between threads.

    Attributes:
        name: below the root; messages say it in place of the path.
        cache: to read from.
    """

    def __init__(self, name: str, cache: Cache, stamp: object, folder: Path | None) -> None:
        self.name = name
        self._folder = folder
        self.cache = cache
        self.stamp = stamp
        self._commits: tuple[float, dict[int, list[int]]] | None = None
        self._complete: set[int] = set()
        self._positions: tuple[int, NDArray[np.int32]] | None = None
        self._lock = threading.Lock()

    def commits(self) -> dict[int, list[int]]:
        """Recorded shards by seed, at most a second old."""
        known, now = self._commits, time.monotonic()
        if known is not None and now - known[0] < COMMITS_TTL_S:
            return known[1]
        found = self.cache.commits()
        self._commits = (now, found)
        return found

    def lookup_rows(
        self,
        seed: int,
        samples: NDArray[np.int64],
        names: tuple[str, ...],
        *,
        at_hand: bool = False,
    ) -> dict[str, Rows]:
        """Rows of samples as bytes, in request order. Raises as `Cache.lookup`.

        Where they are follows from the seed, so while a seed is being recorded nothing has to be
        searched; of a recorded seed, the order that was recorded is what counts.
        """
        if at_hand and seed not in self._complete:
            raise NotAtHandError
        if self._is_complete(seed):
            return self.cache.lookup_rows(seed, samples, names, at_hand=at_hand)
        self.cache.check_samples(samples)
        asked = tuple({"sample": None, **dict.fromkeys(names)})
        rows = self.cache.gather_rows(seed, self._planned(seed, samples), asked)
        if np.array_equal(rows["sample"].view("<i4"), samples):
            return {name: rows[name] for name in names}
        return self.cache.gather_rows(seed, self.cache.locate(seed, samples), names)

    def _is_complete(self, seed: int) -> bool:
        if seed in self._complete:
            return True
        if len(self.commits().get(seed, [])) < self.cache.spec.num_shards:
            return False
        self._complete.add(seed)
        return True

    def _planned(self, seed: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        order = epoch_order(self.cache.spec.dataset.num_samples, seed)
        with self._lock:
            if self._positions is None or self._positions[0] != seed:
                self._positions = (seed, positions_of(order))
            return self._positions[1][samples].astype(np.int64)

    def shards_of_samples(self, seed: int, samples: NDArray[np.int64]) -> list[int]:
        """Where the samples are, or will be, recorded: it follows from the seed."""
        if samples.max() >= self.cache.spec.dataset.num_samples:
            return []
        shards = self._planned(seed, samples) // self.cache.spec.layout.shard_rows
        found: list[int] = np.unique(shards).tolist()
        return found

    def refuse_links(self, key: str) -> None:
        """Refuse an object that a link puts outside of the cache.

        Raises:
            CorruptError: it is one. No writer of ours makes links.
        """
        if self._folder is None:
            return
        if not (self._folder / key).resolve().is_relative_to(self._folder):
            raise CorruptError(f"{self.name}/{key} is a link to somewhere else.", hint=REPAIR)

    def has_commits(self, seed: int, shards: Sequence[int]) -> bool:
        """Whether all of these shards are recorded, as of now."""
        storage = self.cache.storage
        return all(storage.size(commit_key(seed, shard)) is not None for shard in shards)


class _Root(Protocol):
    """Where caches lie side by side.

    Attributes:
        is_quick: whether a stamp takes microseconds.
    """

    @property
    def is_quick(self) -> bool: ...

    def names(self) -> list[str]:
        """What may be caches, sorted."""
        ...

    def stamp(self, name: str) -> object:
        """Equal as long as the same cache lies there; None where there is none."""
        ...

    def storage(self, name: str) -> Storage:
        """Of one cache."""
        ...

    def folder(self, name: str) -> Path | None:
        """Where it really is on this machine; None where it is elsewhere."""
        ...


class Catalog:
    """All caches of a service.

    Attributes:
        is_expected: whether a build will make a cache of that name.

    Raises:
        ConfigError: there is no such folder, or the URL is of no kind that can be listed.
    """

    def __init__(self, root: str, *, open_shards: int) -> None:
        self._root: _Root = _open_root(root)
        self.is_expected: Callable[[str], bool] = lambda _: False
        self._open_shards = open_shards
        self._served: OrderedDict[str, Served] = OrderedDict()
        self._lock = threading.Lock()

    def check(self) -> None:
        """List the root. Raises StorageError or OSError where that is not possible."""
        self._root.names()

    def names(self) -> list[str]:
        """Names of the caches, sorted.

        Raises:
            StorageError: the root cannot be listed.
        """
        return [name for name in self._root.names() if self._root.stamp(name) is not None]

    def at_hand(self, name: str) -> Served:
        """The cache of that name, if it is open and no request to a bucket has to say so.

        Raises:
            NotAtHandError: it is not.
        """
        with self._lock:
            found = self._served.get(name)
        if found is None or not self._root.is_quick or found.stamp != self._root.stamp(name):
            raise NotAtHandError
        return found

    def open(self, name: str) -> Served:
        """The cache of that name.

        Raises:
            NotACacheError: there is none.
            CacheAwaitedError: there is none yet.
            CorruptError: its metadata is damaged.
        """
        stamp = self._root.stamp(name) if NAME.fullmatch(name) else None
        if stamp is None:
            if NAME.fullmatch(name) and self.is_expected(name):
                raise _not_yet(name)
            raise _no_such_cache(name)
        with self._lock:
            found = self._served.get(name)
            if found is not None and found.stamp == stamp:
                self._served.move_to_end(name)
                return found
        cache = open_stored(self._root.storage(name), open_shards=self._open_shards)
        served = Served(name, cache, stamp, self._root.folder(name))
        with self._lock:
            self._served[name] = served
            self._served.move_to_end(name)
            while len(self._served) > MAX_OPEN:
                self._served.popitem(last=False)
        return served


class _Folder:
    """A local root. Links that leave it lead nowhere."""

    is_quick = True

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        if not self._path.is_dir():
            raise ConfigError(
                f"{path} is not a folder.", hint="Name the folder that your caches lie in."
            )
        self._real = self._path.resolve()
        if (self._path / ROOT_KEY).is_file():
            raise ConfigError(
                f"{path} is a cache itself; what is served is the folder that caches lie in.",
                hint=f"kd-cache serve {self._path.parent}",
            )

    def names(self) -> list[str]:
        found = (path.name for path in self._path.iterdir() if NAME.fullmatch(path.name))
        return sorted(name for name in found if self._is_inside(name))

    def stamp(self, name: str) -> object:
        try:
            found = os.stat(f"{self._path}/{name}/{ROOT_KEY}")  # noqa: PTH116  twice as fast
        except OSError:
            return None
        return (found.st_ino, found.st_size, found.st_mtime_ns)

    def storage(self, name: str) -> Storage:
        if not self._is_inside(name):
            raise _no_such_cache(name)
        storage = open_storage(str(self._path / name))
        storage.url = name  # errors go to clients, and the path is the operator's
        return storage

    def folder(self, name: str) -> Path | None:
        return (self._path / name).resolve()

    def _is_inside(self, name: str) -> bool:
        return (self._path / name / ROOT_KEY).resolve().is_relative_to(self._real)


class _Bucket:
    """A root in an object store, where a look costs a request."""

    is_quick = False

    def __init__(self, url: str) -> None:
        from cache_service.storage.objects import ObjectStorage

        self._url = url.rstrip("/")
        self._storage = ObjectStorage(self._url, name="the root")
        self._open = ObjectStorage
        self._stamps: dict[str, tuple[float, bytes | None]] = {}

    def names(self) -> list[str]:
        return [name for name in self._storage.folders() if NAME.fullmatch(name)]

    def stamp(self, name: str) -> object:
        known, now = self._stamps.get(name), time.monotonic()
        if known is not None and now - known[0] < BUCKET_TTL_S:
            return known[1]
        found = self._storage.get(f"{name}/{ROOT_KEY}")
        if len(self._stamps) >= 2 * MAX_OPEN:
            self._stamps.clear()  # names are a client's to choose
        self._stamps[name] = (now, found)
        return found

    def storage(self, name: str) -> Storage:
        return self._open(f"{self._url}/{name}", name=name)

    def folder(self, name: str) -> Path | None:  # noqa: ARG002  one signature for both
        return None


def _no_such_cache(name: str) -> NotACacheError:
    return NotACacheError(
        f"there is no cache {name[:128]!r} here.", hint="GET /v1/caches lists them."
    )


def _not_yet(name: str) -> CacheAwaitedError:
    return CacheAwaitedError(
        f"cache {name!r} is to be recorded by a build that has not begun to.",
        hint="Ask again, or set wait_s in the train file. GET /v1/builds says how far it is.",
    )


def _open_root(root: str) -> _Root:
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
