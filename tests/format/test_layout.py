"""How positions are grouped, and that the metadata says no more than the spec."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.caches import make_spec

from cache_service.errors import ConfigError
from cache_service.format.layout import (
    CHUNK_BYTES,
    COMMITS_KEY,
    MAX_PIECE_BYTES,
    MAX_SHARD_ROWS,
    MIN_SHARD_ROWS,
    MIN_SHARDS,
    SHARD_BYTES,
    CacheLayout,
    default_layout,
)
from cache_service.format.spec import Layout

PORTABLE = {"sharding_indexed", "bytes", "zstd", "crc32c"}


def is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


@given(st.integers(1, 1 << 28), st.integers(1, 2**31 - 1))
def test_default_groups_are_powers_of_two_within_their_limits(bytes_per_row, num_samples):
    layout = default_layout(bytes_per_row, num_samples)
    assert is_power_of_two(layout.shard_rows)
    assert is_power_of_two(layout.chunk_rows)
    assert 2 <= layout.chunk_rows <= layout.shard_rows <= MAX_SHARD_ROWS
    assert layout.chunk_rows <= 1 << 12
    # A shard needs no more rows than the dataset has, to the next power of two.
    assert layout.shard_rows < max(2 * num_samples, 3)
    # Enough shards for several builders, unless they would be tiny.
    shards = -(-num_samples // layout.shard_rows)
    assert shards >= MIN_SHARDS or layout.shard_rows <= MIN_SHARD_ROWS
    if layout.shard_rows > 2:
        assert layout.shard_rows * bytes_per_row <= SHARD_BYTES
    if layout.chunk_rows > 2:
        assert layout.chunk_rows * bytes_per_row <= CHUNK_BYTES


@pytest.mark.parametrize(
    ("bytes_per_row", "num_samples", "rows"),
    [
        (220, 50_000, (2048, 2048)),  # CIFAR-100, one cell, dense
        (4220, 50_000, (2048, 64)),  # CIFAR-100, 21 cells, dense
        (40, 60_000, (2048, 2048)),  # MNIST, one cell, dense
        (2020, 1_281_167, (32768, 256)),  # ImageNet, one cell, dense
        (76, 1_281_167, (32768, 4096)),  # ImageNet, one cell, topk 10
        (43_702, 14_197_122, (1024, 8)),  # ImageNet-21k, one cell, dense
        (40, 8192, (512, 512)),
        (40, 8191, (512, 512)),
        (40, 1797, (512, 512)),  # handwritten digits, one cell
        (40, 10, (16, 16)),
    ],
)
def test_layouts_of_known_datasets_stay_what_they_are(bytes_per_row, num_samples, rows):
    layout = default_layout(bytes_per_row, num_samples)
    assert (layout.shard_rows, layout.chunk_rows) == rows


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({"shard_rows": 0}, "greater than or equal to 2"),
        ({"shard_rows": 2**20 + 2}, "less than or equal to 1048576"),
        ({"shard_rows": 33}, "must be even: mixing partners are the neighbors 2k and 2k"),
        ({"chunk_rows": 0}, "greater than or equal to 1"),
        ({"chunk_rows": 2**21}, "less than or equal to 1048576"),
        ({"chunk_rows": 12}, "layout.chunk_rows=12 must divide layout.shard_rows=32"),
        ({"chunk_rows": 64}, "must divide"),
        ({"rows": 5}, "Extra inputs are not permitted"),
    ],
)
def test_every_bound_is_enforced_and_says_why(rows, says):
    with pytest.raises(ValidationError, match=says):
        Layout(**({"shard_rows": 32, "chunk_rows": 8} | rows))


def test_witnesses_are_spread_over_the_shard_and_inside_it():
    spec = make_spec(num_samples=70)
    assert CacheLayout(spec).witness_positions(0).tolist() == [0, 8, 16, 24]
    assert CacheLayout(spec).witness_positions(2).tolist() == [64, 65, 67, 68]
    assert CacheLayout(make_spec(num_samples=65)).witness_positions(2).tolist() == [64, 64, 64, 64]


@pytest.mark.parametrize("kind", ["dense", "int8", "topk", "features"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_array_names_its_dimensions_and_uses_portable_codecs_with_a_checksum_last(
    kind, compression
):
    more = {"topk": {"k": 3}, "features": {"num_channels": 6}}.get(kind, {})
    spec = make_spec(codec={"kind": kind, "compression": compression} | more)
    documents = CacheLayout(spec).documents(3)
    for name in documents.keys() - {COMMITS_KEY}:
        document = json.loads(documents[name])
        assert len(document["dimension_names"]) == len(document["shape"])
        (outer, *rest) = document["codecs"]
        inner = outer["configuration"]["codecs"] if outer["name"] == "sharding_indexed" else None
        codecs = inner or [outer, *rest]
        assert {codec["name"] for codec in codecs} <= PORTABLE
        assert codecs[-1] == {"name": "crc32c"}
        assert np.dtype(document["data_type"]).kind in "fiu", name


def test_bytes_of_a_row_are_those_of_its_arrays():
    spec = make_spec(scales=(1, 2, 4))  # 16 stored cells, 10 classes
    assert CacheLayout(spec).row_bytes == 4 + 8 + 8 + 16 * 10 * 2
    assert CacheLayout(spec).names == ("sample", "digest", "origin", "logits")
    assert CacheLayout(spec).target_names == ("logits",)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 2**24, "scales": (1,), "chunk_rows": 16, "shard_rows": 32},
        {"codec": {"kind": "features", "num_channels": 2**20}, "num_classes": 100, "chunk_rows": 1},
    ],
)
def test_a_cache_whose_chunks_would_fill_a_readers_memory_is_refused(changes):
    with pytest.raises(
        ConfigError, match=f"would hold [0-9]+ bytes; the limit is {MAX_PIECE_BYTES}"
    ):
        CacheLayout(make_spec(**changes)).check_size()


def test_the_largest_allowed_view_is_kept_as_a_witness():
    CacheLayout(make_spec(size=4096)).check_size()
