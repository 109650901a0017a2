"""A reader's memory does not grow with the cache: a few open shards, a bound on decoded chunks."""

from __future__ import annotations

import pytest
from support.caches import make_spec, write_cache
from support.scan import memory_of_scans

ROWS, ROW_BYTES = 1024, 100 * 2 * 5
"""5 cells of 100 float16 logits; 1024 rows are 1 MB."""

BOUND = 8 * ROWS * ROW_BYTES
"""Allowed growth, where the cache grows by 16 MB."""


def write(folder, *, megabytes: int, shard_rows: int) -> str:
    spec = make_spec(
        num_samples=ROWS * megabytes,
        num_classes=100,
        scales=(1, 2),
        affine_head=False,
        shard_rows=shard_rows,
        chunk_rows=128,
    )
    write_cache(str(folder), spec)
    return str(folder)


# Mapped shards stay open, so those are small; of a fetched one only a few chunks stay.
@pytest.mark.parametrize(("mapped", "shard_rows"), [(True, 1024), (False, 16384)])
def test_scanning_a_cache_twice_as_large_takes_no_more_memory(tmp_path, mapped, shard_rows):
    urls = [
        write(tmp_path / f"{megabytes}", megabytes=megabytes, shard_rows=shard_rows)
        for megabytes in (18, 34)
    ]
    small, large = memory_of_scans(urls, mapped=mapped)
    assert large - small < BOUND, f"{small >> 20} MiB, then {large >> 20} MiB"
