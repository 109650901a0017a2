"""Whole objects of a bucket, kept on this machine's disk and mapped: each is fetched once a host.

A loader with several workers, several ranks, or a random order would otherwise fetch every chunk
once for each of them. What is kept is checked by its reader like what the bucket sends, and a copy
that fails is fetched again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from cache_service.storage import Storage
from cache_service.storage.disk import DiskCache

KEPT_COMMITS = 256
"""Commits kept in memory, some 10 kB each. On the disk there is none: a process that starts always
reads those of the bucket, so that it never takes rows of a recording that was replaced."""


class StagedStorage:
    """One cache in a bucket, whose arrays are read from copies. See `Storage`.

    Args:
        bucket: the objects.
        fingerprint: of the cache: copies of another one under the same address are not taken.
        disk: where copies are kept, shared by the processes of this machine.
    """

    def __init__(self, bucket: Storage, fingerprint: str, disk: DiskCache) -> None:
        self.url = bucket.url
        self.has_locks = bucket.has_locks
        self.disk = disk
        self._bucket = bucket
        self._fingerprint = fingerprint
        self._start_empty()

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self._commits: LRUCache[str, bytes] = LRUCache(KEPT_COMMITS)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is in memory."""
        opened = ("_lock", "_commits")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As it was pickled, with nothing in memory."""
        self.__dict__.update(state)
        self._start_empty()

    def map(self, key: str) -> NDArray[np.uint8] | None:
        """The object's copy, made now if there is none. None: absent, or the disk refuses it."""
        if not self.disk.usable:
            return None
        name = self._name(key)
        with self.disk.one_at_a_time(name):
            mapped = self.disk.map(name)
            if mapped is None and (content := self._bucket.get(key)) is not None:
                self.disk.put(name, content)
                mapped = self.disk.map(name)
        return mapped

    def forget(self, keys: Sequence[str]) -> bool:
        """Remove the copies of these objects. Whether there were any."""
        with self._lock:
            for key in keys:
                self._commits.pop(key, None)
        dropped = [self.disk.drop(self._name(key)) for key in keys]
        return any(dropped)

    def get(self, key: str) -> bytes | None:
        """The object, or None where there is none."""
        with self._lock:
            content = self._commits.get(key)
        if content is None:
            content = self._bucket.get(key)
            if content is not None and key.startswith("commits/"):
                with self._lock:
                    self._commits[key] = content
        return content

    def get_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes] | None:
        """As `Storage.get_ranges`, from the bucket."""
        return self._bucket.get_ranges(key, ranges)

    def size(self, key: str) -> int | None:
        """As `Storage.size`, from the bucket."""
        return self._bucket.size(key)

    def list(self, prefix: str) -> list[str]:
        """As `Storage.list`, from the bucket."""
        return self._bucket.list(prefix)

    def put(self, key: str, content: bytes) -> None:
        """As `Storage.put`, to the bucket."""
        self._bucket.put(key, content)

    def create(self, key: str, content: bytes) -> bool:
        """As `Storage.create`, to the bucket."""
        return self._bucket.create(key, content)

    def delete(self, key: str) -> None:
        """As `Storage.delete`, from the bucket."""
        self._bucket.delete(key)

    def begin(self, name: str) -> bool:
        """As `Storage.begin`, of the bucket."""
        return self._bucket.begin(name)

    def end(self, name: str) -> None:
        """As `Storage.end`, of the bucket."""
        self._bucket.end(name)

    def sweep(self) -> None:
        """As `Storage.sweep`, of the bucket."""
        self._bucket.sweep()

    def _name(self, key: str) -> str:
        return DiskCache.key_of([self._fingerprint, key])
