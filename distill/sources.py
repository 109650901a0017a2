"""Where a student's targets come from. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from cache_service.errors import RowsNotBuiltError
from cache_service.format.seeds import describe_seeds
from cache_service.remote.source import DEFAULT_DISK_BYTES, DiskSettings, RowSource, open_source
from cache_service.rows.reader import DEFAULT_OPEN_SHARDS


def load_cache(
    url: str,
    *,
    fingerprint: str | None = None,
    wait_s: float = 0.0,
    disk_cache: str | None = None,
    disk_cache_bytes: int = DEFAULT_DISK_BYTES,
    open_shards: int = DEFAULT_OPEN_SHARDS,
) -> RowSource:
    """Open a cache by path or URL.

    Args:
        url: a path, `s3://bucket/prefix`, or `http(s)://host/v1/caches/NAME`. A server's token
            comes from the environment, KD_CACHE_TOKEN.
        fingerprint: refuse any other cache.
        wait_s: await rows that are planned but not recorded for so long, in seconds.
        disk_cache: folder in which to keep what a server sent.
        disk_cache_bytes: of that folder, at most.
        open_shards: how many shards of a local cache may be mapped. A sequential scan needs few;
            rows from everywhere need as many as there are.

    Raises:
        NotACacheError, CorruptError, SpecMismatchError, StorageError, ConfigError: see the message.
    """
    disk = None if disk_cache is None else DiskSettings(disk_cache, disk_cache_bytes)
    return open_source(
        url, fingerprint=fingerprint, wait_s=wait_s, disk=disk, open_shards=open_shards
    )


def recorded_seeds(caches: Sequence[RowSource], wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """The seeds to train on: those wanted, or all that every cache has complete.

    A cache whose rows may be awaited counts with all the seeds that are planned.

    Raises:
        RowsNotBuiltError: a wanted seed is not there in some cache, or there is none.
    """
    usable = [_usable(cache) for cache in caches]
    common = sorted(set.intersection(*usable))
    if wanted is None:
        if not common:
            raise RowsNotBuiltError(
                f"no seed is complete in {' and '.join(cache.url for cache in caches)}.",
                hint="Run `kd-cache build FILE` again: it resumes. While a build runs, wait_s in "
                "the train file awaits its rows.",
            )
        return tuple(common)
    for cache, seeds in zip(caches, usable, strict=True):
        missing = [seed for seed in wanted if seed not in seeds]
        if missing:
            state = "planned" if cache.wait_s > 0 else "complete"
            raise RowsNotBuiltError(
                f"seeds {describe_seeds(missing)} were asked for, but {cache.url} has "
                f"{describe_seeds(sorted(seeds))} {state}.",
                hint=f"Record them with `kd-cache build FILE --seeds {describe_seeds(missing)}`.",
            )
    return wanted


def _usable(cache: RowSource) -> set[int]:
    return set(range(cache.num_seeds()) if cache.wait_s > 0 else cache.complete_seeds())
