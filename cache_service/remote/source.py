"""The interface of everything that rows can be read from, and opening it by path or URL."""

from __future__ import annotations

from typing import NamedTuple

from cache_service.errors import ConfigError
from cache_service.remote.cache import open_remote
from cache_service.remote.disk import DiskCache
from cache_service.remote.waiting import WaitingCache
from cache_service.rows.reader import Cache, open_cache
from cache_service.storage import is_server_url

DEFAULT_DISK_BYTES = 10_000_000_000
"""10 GB: two recorded epochs of ImageNet with the codec `topk`."""


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
    open_shards: int | None = None,
) -> Cache:
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
