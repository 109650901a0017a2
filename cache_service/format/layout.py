"""Which arrays a cache has, and the Zarr v3 metadata documents that describe them. Pure.

Every row array leads with (seed, position). One shard is one object per array. The documents are
a function of the spec and the number of seeds, so a reader regenerates them and compares: a flipped
bit in metadata is refused like one in data.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cache_service.errors import ConfigError
from cache_service.format.codecs import class_dtype
from cache_service.format.spec import (
    CacheSpec,
    DenseCodec,
    FeaturesCodec,
    Int8Codec,
    Layout,
    TopKCodec,
)

MAX_WITNESSES = 4
"""Whole views kept per shard: 4 of 150 kB beside tens of MB tell rounding from another crop."""

CHUNK_BYTES = 512 << 10
"""512 KiB: checking one costs 70 us, and latency does not dominate a request of this size."""

SHARD_BYTES = 64 << 20
"""64 MiB: what one kill can cost, and well under what object stores take in one request."""


MAX_PIECE_BYTES = 256 << 20
"""256 MiB: what a reader decodes at a time at most, whatever a cache says of itself."""


@lru_cache(maxsize=16)  # numpy takes a microsecond to read a name, and requests ask often
def _item_bytes(dtype: str) -> int:
    return np.dtype(dtype).itemsize


class RowArray(NamedTuple):
    """One array with a row per (seed, position)."""

    name: str
    dtype: str
    row_shape: tuple[int, ...]
    row_dims: tuple[str, ...]
    fill: float | int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, uncompressed."""
        return math.prod(self.row_shape) * _item_bytes(self.dtype)


def row_arrays(spec: CacheSpec) -> tuple[RowArray, ...]:
    """The arrays of a cache in the order in which a shard writes them."""
    common = (
        RowArray("sample", "int32", (), (), -1),
        RowArray("digest", "uint64", (), (), 0),
        RowArray("origin", "uint64", (), (), 0),
    )
    return common + _codec_arrays(spec)


def _codec_arrays(spec: CacheSpec) -> tuple[RowArray, ...]:
    cells, classes, codec = spec.num_stored_cells, spec.teacher.num_classes, spec.codec
    nan = float("nan")
    if isinstance(codec, DenseCodec):
        return (RowArray("logits", "float16", (cells, classes), ("cell", "class"), nan),)
    if isinstance(codec, FeaturesCodec):
        assert codec.num_channels is not None
        shape = (cells, codec.num_channels)
        return (RowArray("features", "float16", shape, ("cell", "channel"), nan),)
    if isinstance(codec, Int8Codec):
        return (
            RowArray("logits", "uint8", (cells, classes), ("cell", "class"), 0),
            RowArray("scale", "float32", (cells,), ("cell",), nan),
            RowArray("offset", "float32", (cells,), ("cell",), nan),
        )
    assert isinstance(codec, TopKCodec)
    kept = ((cells, codec.k), ("cell", "rank"))
    return (
        RowArray("classes", class_dtype(classes).name, *kept, 0),
        RowArray("values", "float16", *kept, nan),
        RowArray("tail_mean", "float32", (cells,), ("cell",), nan),
        RowArray("tail_var", "float32", (cells,), ("cell",), nan),
        RowArray("tail_max", "float32", (cells,), ("cell",), nan),
        RowArray("tail_lme", "float32", (cells,), ("cell",), nan),
    )


def row_bytes(spec: CacheSpec) -> int:
    """Uncompressed bytes of one recorded view over all arrays."""
    return sum(array.row_bytes for array in row_arrays(spec))


def default_layout(bytes_per_row: int, num_samples: int) -> Layout:
    """Powers of two near CHUNK_BYTES and SHARD_BYTES, no larger than the dataset needs."""

    def power(limit: float) -> int:
        return 1 << max(1, int(limit).bit_length() - 1)

    whole = 1 << max(1, (num_samples - 1).bit_length())
    shard_rows = min(power(SHARD_BYTES / bytes_per_row), whole, 1 << 16)
    chunk_rows = min(power(CHUNK_BYTES / bytes_per_row), shard_rows, 1 << 12)
    return Layout(shard_rows=shard_rows, chunk_rows=chunk_rows)


def object_key(array: RowArray, seed: int, shard: int) -> str:
    """Zarr key of one array's shard object."""
    return f"{array.name}/c/{seed}/{shard}" + "/0" * len(array.row_shape)


def witness_key(seed: int, shard: int) -> str:
    """Zarr key of the witnesses of one shard."""
    return f"witness/c/{seed}/{shard}/0/0/0/0"


def num_witnesses(spec: CacheSpec) -> int:
    """Whole views kept per shard."""
    return min(MAX_WITNESSES, spec.layout.shard_rows)


def witness_shape(spec: CacheSpec) -> tuple[int, int, int, int]:
    """Shape of one shard's witnesses: (witness, y, x, rgb), uint8."""
    return (num_witnesses(spec), spec.recipe.size, spec.recipe.size, 3)


def witness_positions(spec: CacheSpec, shard: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Positions whose views are kept, evenly spread over the shard; repeated in a tiny one."""
    start, stop = spec.shard_range(shard)
    count = num_witnesses(spec)
    return start + np.arange(count, dtype=np.int64) * (stop - start) // count


def refuse_oversize(spec: CacheSpec) -> None:
    """Raise ConfigError where a reader would have to decode more than MAX_PIECE_BYTES at once."""
    pieces = {array.name: array.row_bytes * spec.layout.chunk_rows for array in row_arrays(spec)}
    pieces |= {name: 4 * math.prod(shape) for name, shape in head_arrays(spec).items()}
    pieces["witness"] = math.prod(witness_shape(spec))
    name, size = max(pieces.items(), key=lambda piece: piece[1])
    if size > MAX_PIECE_BYTES:
        raise ConfigError(
            f"one chunk of {name} would hold {size} bytes; the limit is {MAX_PIECE_BYTES}.",
            hint="Set a smaller layout.chunk_rows, fewer scales, or codec topk.",
        )


def head_arrays(spec: CacheSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the constant float32 arrays: the head of the `features` codec, else none."""
    if not isinstance(spec.codec, FeaturesCodec):
        return {}
    assert spec.codec.num_channels is not None
    classes = spec.teacher.num_classes
    return {"head_weight": (classes, spec.codec.num_channels), "head_bias": (classes,)}


def head_key(name: str, shape: tuple[int, ...]) -> str:
    """Zarr key of a constant array's only chunk."""
    return f"{name}/c" + "/0" * len(shape)


# --- Zarr v3 metadata documents ------------------------------------------------------------------

_BYTES: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_ZSTD: dict[str, Any] = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
_CRC: dict[str, Any] = {"name": "crc32c"}


def group_document(attributes: dict[str, Any]) -> dict[str, Any]:
    """`zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def array_documents(spec: CacheSpec, num_seeds: int) -> dict[str, dict[str, Any]]:
    """`zarr.json` of every array, by array name."""
    documents = {array.name: _row_document(spec, array, num_seeds) for array in row_arrays(spec)}
    witness = witness_shape(spec)
    documents["witness"] = _array_document(
        shape=(num_seeds, spec.num_shards, *witness),
        chunk_shape=(1, 1, *witness),
        dtype="uint8",
        fill=0,
        codecs=[_BYTES, _ZSTD, _CRC],
        dims=("seed", "shard", "witness", "y", "x", "rgb"),
    )
    for name, shape in head_arrays(spec).items():
        documents[name] = _array_document(
            shape=shape,
            chunk_shape=shape,
            dtype="float32",
            fill=float("nan"),
            codecs=[_BYTES, _CRC],
            dims=("class", "channel")[: len(shape)],
        )
    return documents


def _row_document(spec: CacheSpec, array: RowArray, num_seeds: int) -> dict[str, Any]:
    inner = [_BYTES, _ZSTD, _CRC] if spec.codec.compression == "zstd" else [_BYTES, _CRC]
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, spec.layout.chunk_rows, *array.row_shape],
            "codecs": inner,
            "index_codecs": [_BYTES, _CRC],
            "index_location": "end",
        },
    }
    return _array_document(
        shape=(num_seeds, spec.dataset.num_samples, *array.row_shape),
        chunk_shape=(1, spec.layout.shard_rows, *array.row_shape),
        dtype=array.dtype,
        fill=array.fill,
        codecs=[sharding],
        dims=("seed", "position", *array.row_dims),
    )


def _array_document(
    *,
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    dtype: str,
    fill: float,
    codecs: list[dict[str, Any]],
    dims: tuple[str, ...],
) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        # NaN poisons any loss, so even a reader that knows no commits cannot train on a hole.
        "fill_value": "NaN" if fill != fill else fill,  # noqa: PLR0124  NaN differs from itself
        "codecs": codecs,
        "dimension_names": list(dims),
        "attributes": {},
    }
