"""What a reader of rows needs, whoever has them, and how to open it by path or URL."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import ConfigError
from cache_service.format.codecs import Arrays, Head
from cache_service.format.commit import Commit
from cache_service.format.group import Group
from cache_service.format.spec import CacheSpec
from cache_service.reader import DEFAULT_OPEN_SHARDS, open_cache
from cache_service.remote.cache import open_remote
from cache_service.remote.disk import DiskCache
from cache_service.remote.following import FollowingCache

DEFAULT_DISK_BYTES = 10_000_000_000
"""10 GB: two recorded epochs of ImageNet under `topk`, and little beside what is downloaded."""


class RowSource(Protocol):
    """Recorded rows, checked as they are read. Picklable; one instance is for one thread.

    The methods are those of `cache_service.reader.Cache`, and say more there.
    """

    @property
    def url(self) -> str:
        """Where it is."""
        ...

    @property
    def spec(self) -> CacheSpec:
        """Its identity."""
        ...

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries that rendered its views."""
        ...

    @property
    def group(self) -> Group:
        """All that its root document says."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity in 64 hexadecimal digits."""
        ...

    @property
    def wait_s(self) -> float:
        """How long rows are awaited that are planned but not recorded, in seconds."""
        ...

    def commits(self) -> dict[int, list[int]]:
        """Recorded shards by seed."""
        ...

    def num_seeds(self) -> int:
        """One more than the largest seed that was planned."""
        ...

    def complete_seeds(self) -> list[int]:
        """Seeds of which every shard is recorded."""
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
        """Encoded rows of scattered positions, in the order asked for."""
        ...

    def lookup(
        self, seed: int, samples: NDArray[np.int64], *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of the given samples, in the order asked for."""
        ...

    def witnesses(self, seed: int, shard: int) -> NDArray[np.uint8]:
        """The whole views kept of a shard."""
        ...

    def head(self) -> Head | None:
        """The linear head of a `features` cache, else None."""
        ...


class DiskSettings(NamedTuple):
    """Where rows of a server are kept between runs, and how many bytes of them at most."""

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
        fingerprint: refuse any other cache.
        wait_s: await rows that are planned but not recorded for so long, in seconds.
        disk: keep what a server sent; for servers only.
        open_shards: how many shards of a local cache may be mapped at a time.

    Raises:
        NotACacheError, CorruptError, SpecMismatchError, StorageError: see the message.
        ConfigError: the URL is not usable, or the server wants a token.
    """
    if url.startswith(("http://", "https://")):
        store = DiskCache(*disk) if disk is not None else None
        return open_remote(url, fingerprint=fingerprint, wait_s=wait_s, disk=store)
    if disk is not None:
        raise ConfigError(
            f"disk_cache was set for {url}: it keeps rows of http(s):// caches only.",
            hint="Leave it out, or copy the cache to this machine.",
        )
    cache = open_cache(url, fingerprint=fingerprint, open_shards=open_shards)
    if wait_s <= 0:
        return cache
    return FollowingCache(cache.storage, cache.group, wait_s=wait_s, open_shards=open_shards)
