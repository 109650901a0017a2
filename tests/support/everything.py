"""Read all that a cache holds, and say what came of it: whole, refused, or (a bug) wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from cache_service.errors import KdCacheError
from cache_service.format.layout import CacheLayout
from cache_service.format.spec import CacheSpec
from cache_service.rows.reader import Cache, open_cache
from support.caches import make_head, make_rows, make_witnesses


@dataclasses.dataclass
class Expected:
    """Known content of the caches of `support.caches`, worked out once."""

    spec: CacheSpec
    num_seeds: int

    def __post_init__(self) -> None:
        self.rows = [make_rows(self.spec, seed) for seed in range(self.num_seeds)]
        self.witnesses = {
            (seed, shard): make_witnesses(self.spec, seed, shard)
            for seed in range(self.num_seeds)
            for shard in range(self.spec.num_shards)
        }
        self.head = make_head(self.spec)


def same_rows(found: dict[str, Any], wanted: dict[str, Any], where: Any) -> bool:
    """Whether rows are byte for byte those of `wanted` at `where` (a slice or positions)."""
    return found.keys() == wanted.keys() and all(
        values.tobytes() == wanted[name][where].tobytes() for name, values in found.items()
    )


def read_all(cache: Cache, expected: Expected) -> str:
    """`whole` where all is there and as recorded, else `wrong`; raises what refuses."""
    spec = expected.spec
    right = cache.spec == spec
    right &= cache.complete_seeds() == list(range(expected.num_seeds))
    for seed, rows in enumerate(expected.rows):
        found = cache.read(seed, 0, spec.dataset.num_samples)
        right &= same_rows(found, rows, slice(None))
        samples = np.arange(spec.dataset.num_samples)
        right &= cache.lookup(seed, samples, arrays=("sample",))["sample"].tolist() == (
            samples.tolist()
        )
        for shard in range(spec.num_shards):
            wanted = expected.witnesses[seed, shard]
            right &= cache.witnesses(seed, shard).tobytes() == wanted.tobytes()
    head = cache.head()
    if expected.head is not None:
        right &= head is not None and all(
            part.tobytes() == wanted.tobytes()
            for part, wanted in zip(head, expected.head, strict=True)
        )
    return "whole" if right else "wrong"


def outcome(url: str, expected: Expected) -> str:
    """`whole`, `wrong`, or the refusal's code and words."""
    try:
        return read_all(open_cache(url), expected)
    except KdCacheError as refusal:
        return f"{refusal.code}: {refusal}"


def shard_outcomes(url: str, expected: Expected) -> list[str]:
    """The same of each shard by itself: a cache that is half built is whole in parts."""
    try:
        cache = open_cache(url)
    except KdCacheError as refusal:
        return [f"{refusal.code}: {refusal}"]
    said = []
    for seed, rows in enumerate(expected.rows):
        for shard in range(expected.spec.num_shards):
            start, stop = expected.spec.shard_range(shard)
            try:
                found = cache.read(seed, start, stop)
                views = cache.witnesses(seed, shard)
                cache.head()
            except KdCacheError as refusal:
                said.append(f"{refusal.code}: {refusal}")
                continue
            same = same_rows(found, rows, slice(start, stop))
            same &= views.tobytes() == expected.witnesses[seed, shard].tobytes()
            said.append("whole" if same else "wrong")
    return said


def files_of(root: Path) -> list[Path]:
    """Every file of a cache, sorted."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def array_names(spec: CacheSpec) -> list[str]:
    return [array.name for array in CacheLayout(spec).arrays]
