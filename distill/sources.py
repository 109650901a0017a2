"""Where a student's targets come from. No torch."""

from __future__ import annotations

from cache_service.errors import RowsNotBuiltError
from cache_service.format.seeds import describe_seeds
from cache_service.reader import Cache, open_cache


def load_cache(url: str, *, fingerprint: str | None = None) -> Cache:
    """Open a cache by path or URL; with `fingerprint`, refuse any other.

    Raises:
        NotACacheError, CorruptError, SpecMismatchError: see the message.
    """
    return open_cache(url, fingerprint=fingerprint)


def recorded_seeds(caches: list[Cache], wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """The seeds to train on: those wanted, or all that every cache has complete.

    Raises:
        RowsNotBuiltError: a wanted seed is not complete in some cache, or there is none.
    """
    complete = [set(cache.complete_seeds()) for cache in caches]
    common = sorted(set.intersection(*complete))
    if wanted is None:
        if not common:
            raise RowsNotBuiltError(
                f"no seed is complete in {' and '.join(cache.url for cache in caches)}.",
                hint="Run `kd-cache build FILE` again: it resumes.",
            )
        return tuple(common)
    for cache, seeds in zip(caches, complete, strict=True):
        missing = [seed for seed in wanted if seed not in seeds]
        if missing:
            raise RowsNotBuiltError(
                f"seeds {describe_seeds(missing)} were asked for, but {cache.url} has "
                f"{describe_seeds(sorted(seeds))} complete.",
                hint=f"Record them with `kd-cache build FILE --seeds {describe_seeds(missing)}`.",
            )
    return wanted
