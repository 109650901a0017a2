"""The interface of everything that rows can be read from, and opening it by path or URL."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from cache_service.errors import ConfigError
from cache_service.format.layout import CacheLayout
from cache_service.human_format import human_bytes
from cache_service.remote.cache import open_remote
from cache_service.remote.waiting import WaitingCache
from cache_service.rows.reader import Cache, open_cache
from cache_service.storage import is_bucket_url, is_server_url
from cache_service.storage.disk import DiskCache
from cache_service.storage.staged import StagedStorage

LOG = logging.getLogger(__name__)

DEFAULT_DISK_BYTES = 10_000_000_000
"""10 GB: two recorded epochs of ImageNet with the codec `topk`."""


class DiskSettings(NamedTuple):
    """The folder that keeps rows of a server or objects of a bucket, and its size limit in bytes.

    Attributes:
        folder: None is `default_folder()` for a bucket, and no folder for a server.
        max_bytes: 0 keeps nothing.
    """

    folder: str | None = None
    max_bytes: int = DEFAULT_DISK_BYTES


DEFAULT_DISK = DiskSettings()


def default_folder() -> str:
    """The folder `kd-cache` in the user's cache folder, which XDG_CACHE_HOME may name."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kd-cache")


def open_source(
    url: str,
    *,
    fingerprint: str | None = None,
    wait_s: float = 0.0,
    disk: DiskSettings = DEFAULT_DISK,
    open_shards: int | None = None,
) -> Cache:
    """Open a cache by path or URL.

    Args:
        url: a path, `s3://bucket/prefix`, or `http(s)://host/v1/caches/NAME`.
        fingerprint: any other cache is refused.
        wait_s: how long to wait for rows that are planned but not recorded, in seconds.
        disk: keeps what a server or a bucket sent.
        open_shards: how many shards of a local cache may be mapped at a time.

    Raises:
        NotACacheError, CorruptError, SpecMismatchError, StorageError: see the message.
        ConfigError: the URL is not usable, the server asks for a token, or a shard is larger than
            `disk` may become.
    """
    if is_server_url(url):
        store = DiskCache(disk.folder, disk.max_bytes) if disk.folder and disk.max_bytes else None
        return open_remote(url, fingerprint=fingerprint, wait_s=wait_s, disk=store)
    if disk.folder is not None and not is_bucket_url(url):
        raise ConfigError(
            f"disk_cache is set for {url}, but it applies to servers and buckets only.",
            hint="Leave it out: a folder is read where it is.",
        )
    cache = open_cache(url, fingerprint=fingerprint, open_shards=open_shards)
    if is_bucket_url(url) and disk.max_bytes:
        cache.storage = _staged(cache, disk)
    if wait_s <= 0:
        return cache
    return WaitingCache(cache.storage, cache.group, wait_s=wait_s, open_shards=open_shards)


def _staged(cache: Cache, disk: DiskSettings) -> StagedStorage:
    folder = disk.folder or default_folder()
    smallest = 2 * _largest_shard_bytes(cache.layout)
    if disk.max_bytes < smallest:
        raise ConfigError(
            f"disk_cache_bytes is {disk.max_bytes}, but a batch may need two shards of "
            f"{cache.url}, which are {smallest} bytes.",
            hint=f"Set disk_cache_bytes: {smallest} or more, or 0 to keep nothing.",
        )
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one of the processes that torchrun starts here
        LOG.warning(
            "%s is read through copies in %s, at most %s (disk_cache, disk_cache_bytes).",
            cache.url,
            folder,
            human_bytes(disk.max_bytes),
        )
    return StagedStorage(cache.storage, cache.fingerprint, DiskCache(folder, disk.max_bytes))


def _largest_shard_bytes(layout: CacheLayout) -> int:
    return layout.row_object_bytes(0) + 8 * len(layout.arrays)  # 8: the checksum of a copy
