"""Which arrays and objects a cache has, and the Zarr v3 documents that describe them. No I/O.

Every row array leads with (seed, position). One shard is one object per array. The documents are
a function of the spec and the number of seeds, so a reader regenerates them and compares: a flipped
bit in metadata is refused like one in data.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import ConfigError
from cache_service.format.canonical import canonical_json
from cache_service.format.codecs import RowArray
from cache_service.format.spec import CacheSpec, Layout

MAX_WITNESSES = 4
"""Whole views kept per shard: 4 of 150 kB beside tens of MB tell rounding from another crop."""

CHUNK_BYTES = 512 << 10
"""512 KiB: checking one costs 70 us, and latency does not dominate a request of this size."""

SHARD_BYTES = 64 << 20
"""64 MiB: what one kill can cost, and well under what object stores take in one request."""

MIN_SHARDS = 16
"""Shards a seed where the dataset allows: several builders share them, and a kill costs few."""

MIN_SHARD_ROWS = 512
"""Smaller shards are not made for MIN_SHARDS: files and fsyncs would cost more than they save."""

MAX_SHARD_ROWS = 1 << 15
"""Two minutes of a teacher that answers 273 views a second, however small a row is."""

MAX_PIECE_BYTES = 256 << 20
"""256 MiB: what a reader decodes at a time at most, whatever a cache says of itself."""

COMMITS_KEY = "commits/zarr.json"
"""The commits live in a group of their own, so that Zarr libraries list the cache without warnings
about keys that they do not know."""

IDENTITY_ARRAYS = (
    RowArray("sample", "int32", (), (), -1),
    RowArray("digest", "uint64", (), (), 0),
    RowArray("origin", "uint64", (), (), 0),
)
"""What every cache stores of a view, whatever its codec."""


class CacheLayout:
    """The arrays and objects of one cache, worked out from its spec once, when it is opened.

    Attributes:
        spec: of the cache.
        arrays: the row arrays, in the order in which a shard writes them.
        by_name: the same by name.
        names: of the row arrays.
        target_names: of those that the codec stores.
        row_bytes: uncompressed bytes of one recorded view over all arrays.
        heads: shapes of the constant float32 arrays by name; empty unless features are stored.
        witness_shape: of one shard's witnesses: (witness, y, x, rgb), uint8.
        num_chunks: chunks of a whole shard.
    """

    def __init__(self, spec: CacheSpec) -> None:
        codec, num_classes = spec.codec, spec.teacher.num_classes
        stored = codec.arrays(spec.num_stored_cells, num_classes)
        side = spec.recipe.size
        self.spec = spec
        self.arrays = IDENTITY_ARRAYS + stored
        self.by_name = {array.name: array for array in self.arrays}
        self.names = tuple(self.by_name)
        self.target_names = tuple(array.name for array in stored)
        self.row_bytes = sum(array.row_bytes for array in self.arrays)
        self.heads = codec.head_shapes(num_classes)
        self.witness_shape = (min(MAX_WITNESSES, spec.layout.shard_rows), side, side, 3)
        self.num_chunks = spec.layout.shard_rows // spec.layout.chunk_rows

    def object_key(self, name: str, seed: int, shard: int) -> str:
        """Zarr key of a row array's or the witnesses' object of one shard."""
        dims = len(self.witness_shape if name == "witness" else self.by_name[name].row_shape)
        return f"{name}/c/{seed}/{shard}" + "/0" * dims

    def object_keys(self, seed: int, shard: int) -> dict[str, str]:
        """Keys of all objects that the commit of a shard names, by array name."""
        return {name: self.object_key(name, seed, shard) for name in (*self.names, "witness")}

    def head_keys(self) -> dict[str, str]:
        """Zarr keys of the only chunk of each constant array, by array name."""
        return {name: f"{name}/c" + "/0" * len(shape) for name, shape in self.heads.items()}

    def row_object_bytes(self, shard: int) -> int:
        """Bytes of a shard's row objects as they are stored, without compression.

        The last chunk is padded. A chunk has a CRC, and an object an index of 16 B a chunk.
        """
        start, stop = self.spec.shard_range(shard)
        chunk_rows = self.spec.layout.chunk_rows
        chunks = -(-(stop - start) // chunk_rows)
        rows = chunks * chunk_rows * self.row_bytes
        return rows + len(self.arrays) * (4 * chunks + 16 * self.num_chunks + 4)

    def witness_positions(self, shard: int) -> NDArray[np.int64]:
        """Positions whose views are kept, evenly spaced over the shard; repeated in a tiny one."""
        start, stop = self.spec.shard_range(shard)
        count = self.witness_shape[0]
        return start + np.arange(count, dtype=np.int64) * (stop - start) // count

    def check_size(self) -> None:
        """Raise ConfigError where a reader would have to decode more than MAX_PIECE_BYTES."""
        rows = self.spec.layout.chunk_rows
        pieces = {array.name: array.row_bytes * rows for array in self.arrays}
        pieces |= {name: 4 * math.prod(shape) for name, shape in self.heads.items()}
        pieces["witness"] = math.prod(self.witness_shape)
        name, size = max(pieces.items(), key=lambda piece: piece[1])
        if size > MAX_PIECE_BYTES:
            raise ConfigError(
                f"one chunk of {name} would hold {size} bytes; the limit is {MAX_PIECE_BYTES}.",
                hint="Set a smaller layout.chunk_rows, fewer scales, or codec topk.",
            )

    def documents(self, num_seeds: int) -> dict[str, bytes]:
        """Every `zarr.json` below the root, by key, in canonical bytes."""
        documents = {array.name: self._row_document(array, num_seeds) for array in self.arrays}
        documents["witness"] = _array_document(
            shape=(num_seeds, self.spec.num_shards, *self.witness_shape),
            chunk_shape=(1, 1, *self.witness_shape),
            dtype="uint8",
            fill=0,
            codecs=[_BYTES, _ZSTD, _CRC],
            dims=("seed", "shard", "witness", "y", "x", "rgb"),
        )
        for name, shape in self.heads.items():
            documents[name] = _array_document(
                shape=shape,
                chunk_shape=shape,
                dtype="float32",
                fill=float("nan"),
                codecs=[_BYTES, _CRC],
                dims=("class", "channel")[: len(shape)],
            )
        documents["commits"] = group_document(
            {"purpose": "one JSON object per recorded shard: {seed}/{shard}.json"}
        )
        return {f"{name}/zarr.json": canonical_json(each) for name, each in documents.items()}

    def seed_axis_keys(self) -> tuple[str, ...]:
        """Keys of the documents whose shape begins with the number of seeds."""
        return tuple(f"{name}/zarr.json" for name in (*self.names, "witness"))

    def _row_document(self, array: RowArray, num_seeds: int) -> dict[str, Any]:
        spec = self.spec
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


def default_layout(bytes_per_row: int, num_samples: int) -> Layout:
    """Powers of two: chunks near CHUNK_BYTES, and shards within SHARD_BYTES and MAX_SHARD_ROWS.

    A seed has at least MIN_SHARDS shards if that leaves MIN_SHARD_ROWS to each. A shard has no more
    rows than the dataset needs. A measured rate must not matter: it would change the identity.
    """

    def power(limit: float) -> int:
        return 1 << max(1, int(limit).bit_length() - 1)

    whole = 1 << max(1, (num_samples - 1).bit_length())
    shared = max(power(num_samples / MIN_SHARDS), MIN_SHARD_ROWS)
    shard_rows = min(power(SHARD_BYTES / bytes_per_row), whole, shared, MAX_SHARD_ROWS)
    chunk_rows = min(power(CHUNK_BYTES / bytes_per_row), shard_rows, 1 << 12)
    return Layout(shard_rows=shard_rows, chunk_rows=chunk_rows)


def described_seeds(document: bytes | None) -> int:
    """Length of the seed axis that an array's document describes; 0 where it is not readable."""
    try:
        return int(json.loads(document or b"{}")["shape"][0])
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        return 0


# --- Zarr v3 metadata documents ------------------------------------------------------------------

_BYTES: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_ZSTD: dict[str, Any] = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
_CRC: dict[str, Any] = {"name": "crc32c"}


def group_document(attributes: dict[str, Any]) -> dict[str, Any]:
    """`zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


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
