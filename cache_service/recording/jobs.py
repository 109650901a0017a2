"""Which shards are to be recorded, by whom, and in which teacher batches. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cache_service.errors import ConfigError
from cache_service.format.spec import CacheSpec


class Shard(NamedTuple):
    """One unit of work."""

    seed: int
    shard: int


class Job(NamedTuple):
    """One teacher batch: positions [start, stop) of a seed, all in one shard."""

    seed: int
    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """One of `count` builders that share a build; `index` counts modulo `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, written: str) -> Part:
        """`i/n`. Numbering may start at 0 or at 1: i is taken modulo n, so n/n is 0/n.

        Raises:
            ConfigError: not of that form, or i beyond n.
        """
        first, slash, second = written.partition("/")
        if not (slash and first.isdigit() and second.isdigit()):
            raise ConfigError(f"--shard {written!r} is not of the form i/n.", hint="Such as 0/4.")
        index, count = int(first), int(second)
        if count < 1 or index > count:
            raise ConfigError(
                f"--shard {written!r}: there are {count} parts.", hint=f"Use 0/{count} and up."
            )
        return cls(index % count, count)


WHOLE = Part()
"""The part of a builder that works alone."""


def all_shards(spec: CacheSpec, seeds: Sequence[int]) -> list[Shard]:
    """Every shard of the seeds in the order of recording."""
    return [Shard(seed, shard) for seed in seeds for shard in range(spec.num_shards)]


def my_shards(shards: list[Shard], part: Part) -> list[Shard]:
    """Every `count`-th shard, so that parts advance through the seeds side by side."""
    return shards[part.index :: part.count]


def teacher_batches(spec: CacheSpec, shards: Iterable[Shard], batch_size: int) -> Iterator[Job]:
    """Cut shards into batches. A batch never crosses a shard's edge.

    So a shard's bytes do not depend on which shards were recorded before it. Shards are taken one
    by one as batches are asked for, so their order may still change.
    """
    for seed, shard in shards:
        first, last = spec.shard_range(shard)
        for start in range(first, last, batch_size):
            yield Job(seed, shard, start, min(start + batch_size, last))
