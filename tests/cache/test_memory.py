"""A reader's memory does not grow with the cache: a few open shards, a few decoded chunks."""

from __future__ import annotations

import pytest
from support.caches import make_spec, write_cache
from support.scan import memory_of_scans

SHARD_BYTES = 1024 * 100 * 2 * 5
"""1024 rows of 5 cells of 100 float16 logits: 1 MB."""

BOUND = 6 * SHARD_BYTES
"""Allowed growth. Four shards stay mapped; the larger cache has 40, the smaller one 4."""


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Addresses of a cache of 4 MB and of one of 40 MB."""
    urls = []
    for shards in (4, 40):
        spec = make_spec(
            num_samples=1024 * shards,
            num_classes=100,
            scales=(1, 2),
            affine_head=False,
            shard_rows=1024,
            chunk_rows=128,
        )
        urls.append(str(tmp_path_factory.mktemp("cache")))
        write_cache(urls[-1], spec)
    return urls


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "fetched"])
def test_scanning_a_cache_ten_times_as_large_takes_no_more_memory(caches, mapped):
    small, large = memory_of_scans([caches[0], caches[1]], mapped=mapped)
    assert large - small < BOUND, f"{small >> 20} MiB, then {large >> 20} MiB"
