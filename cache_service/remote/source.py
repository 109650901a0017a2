"""The interface of everything that rows can be read from, and opening it by path or URL."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import ConfigError
from cache_service.format.codecs import Arrays, Head
from cache_service.format.commit import Commit
from cache_service.format.group import Group
from cache_service.format.spec import CacheSpec
from cache_service.remote.cache import open_remote
from cache_service.remote.disk import DiskCache
from cache_service.remote.waiting import WaitingCache
from cache_service.rows.reader import DEFAULT_OPEN_SHARDS, open_cache
from cache_service.storage import is_server_url

DEFAULT_DISK_BYTES = 10_000_000_000
"""10 GB: two recorded epochs of ImageNet with the codec `topk`."""


class RowSource(Protocol):
    """Recorded rows, checked as they are read. Picklable; one instance is for one thread.

    The methods are those of `cache_service.rows.reader.Cache`, which documents them.
    """

    @property
    def url(self) -> str:
        """The path or URL."""
        ...

    @property
    def spec(self) -> CacheSpec:
        """Everything that identifies the cache."""
        ...

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that rendered its views."""
        ...

    @property
    def group(self) -> Group:
        """The content of its root document."""
        ...

    @property
    def fingerprint(self) -> str:
        """The identity of the cache: 64 hexadecimal digits."""
        ...

    @property
    def wait_s(self) -> float:
        """How long to wait for rows that are planned but not recorded, in seconds."""
        ...

    def commits(self) -> dict[int, list[int]]:
        """Recorded shards by seed."""
        ...

    def num_seeds(self) -> int:
        """One more than the largest planned seed."""
        ...

    def complete_seeds(self) -> list[int]:
        """Seeds whose shards are all recorded."""
        ...

    def commit(self, seed: int, shard: int) -> Commit:
        """The checked commit of a shard."""
        ...

    def read(
        self, seed: int, start: int, stop: int, *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of the recorded positions [start, stop)."""
        ...

    def gather(
        self, seed: int, positions: NDArray[np.int64], *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of scattered positions, in request order."""
        ...

    def lookup(
        self, seed: int, samples: NDArray[np.int64], *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of the given samples, in request order."""
        ...

    def witnesses(self, seed: int, shard: int) -> NDArray[np.uint8]:
        """The whole views that a shard keeps as witnesses."""
        ...

    def head(self) -> Head | None:
        """The linear head of a `features` cache, otherwise None."""
        ...


class DiskSettings(NamedTuple):
    """The folder that keeps a server's rows between runs, and its size limit in bytes."""

    folder: str
    max_bytes: int = DEFAULT_DISK_BYTES


def open_source(
    url: str,
    *,
    fingerprint: str | None = None,
    wait_s: float = 0.0,
    disk: DiskSettings | None = None,
    open_shards: int = DEFAULT_OPEN_SHARDS,
) -> RowSource:
    """Open a cache by path or URL.

    Args:
        url: a path, `s3://bucket/prefix`, or `http(s)://host/v1/caches/NAME`.
        fingerprint: any other cache is refused.
        wait_s: how long to wait for rows that are planned but not recorded, in seconds.
        disk: keeps the rows that a server sent; for servers only.
        open_shards: how many shards of a local cache may be mapped at a time.

    Raises:
        NotACacheError, CorruptError, SpecMismatchError, StorageError: see the message.
        ConfigError: the URL is not usable, or the server asks for a token.
    """
    if is_server_url(url):
        store = DiskCache(*disk) if disk is not None else None
        return open_remote(url, fingerprint=fingerprint, wait_s=wait_s, disk=store)
    if disk is not None:
        raise ConfigError(
            f"disk_cache is set for {url}, but it applies to http(s):// caches only.",
            hint="Leave it out, or copy the cache to this machine.",
        )
    cache = open_cache(url, fingerprint=fingerprint, open_shards=open_shards)
    if wait_s <= 0:
        return cache
    return WaitingCache(cache.storage, cache.group, wait_s=wait_s, open_shards=open_shards)
