"""Rows of one committed shard, each chunk checked before its first row is handed out.

An uncompressed shard on a local disk is one strided memory map, and reading a batch is one gather.
Everything else is read by whole chunks, several in one request, with the last few kept.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import CorruptError
from cache_service.format.codecs import Arrays
from cache_service.format.commit import Commit
from cache_service.format.layout import (
    RowArray,
    object_key,
    row_arrays,
    witness_key,
    witness_shape,
)
from cache_service.format.shard import (
    CRC_BYTES,
    REPAIR,
    ChunkTable,
    check_chunk,
    check_index,
    check_table,
    decode_chunk,
    index_size,
)
from cache_service.format.spec import CacheSpec
from cache_service.storage import Storage

KEPT_CHUNKS = 4
"""Decoded chunks kept per array. A sequential scan needs one, a batch across an edge two."""


class ShardRows:
    """One shard, opened through its commit."""

    def __init__(self, storage: Storage, spec: CacheSpec, commit: Commit) -> None:
        self._storage = storage
        self._spec = spec
        self._commit = commit
        self._specs = {array.name: array for array in row_arrays(spec)}
        self._readers: dict[str, _MappedArray | _FetchedArray] = {}

    def slice(self, names: tuple[str, ...], start: int, stop: int) -> Arrays:
        """Rows [start, stop) of the shard, by array name."""
        return {name: self._reader(name).slice(start, stop) for name in names}

    def gather(self, names: tuple[str, ...], rows: NDArray[np.int64]) -> Arrays:
        """Scattered rows of the shard, in the order given, by array name."""
        return {name: self._reader(name).gather(rows) for name in names}

    def witnesses(self) -> NDArray[np.uint8]:
        """The whole views kept of this shard, uint8 [W, H, W, 3]."""
        table = self._commit.objects["witness"]
        key = witness_key(self._commit.seed, self._commit.shard)
        what = f"{self._storage.url}/{key}"
        shape = witness_shape(self._spec)
        check_table(
            table,
            num_stored=1,
            num_bytes=math.prod(shape),
            index_bytes=0,
            compression="zstd",
            what=what,
        )
        content = self._storage.get(key) or b""
        _check_size(len(content), table, what)
        payload = decode_chunk(
            content,
            checksum=int(table.checksums[0]),
            compression="zstd",
            num_bytes=math.prod(shape),
            what=what,
        )
        return np.frombuffer(payload, np.uint8).reshape(shape)

    def _reader(self, name: str) -> _MappedArray | _FetchedArray:
        if name not in self._readers:
            array = self._specs[name]
            start, stop = self._spec.shard_range(self._commit.shard)
            stored = _StoredArray(
                storage=self._storage,
                key=object_key(array, self._commit.seed, self._commit.shard),
                array=array,
                table=self._commit.objects[name],
                num_rows=stop - start,
                chunk_rows=self._spec.layout.chunk_rows,
                num_chunks=self._spec.layout.shard_rows // self._spec.layout.chunk_rows,
                compression=self._spec.codec.compression,
            )
            self._readers[name] = _open(stored)
        return self._readers[name]


class _StoredArray(NamedTuple):
    """One array's object in one shard: where it is and what it must be."""

    storage: Storage
    key: str
    array: RowArray
    table: ChunkTable
    num_rows: int
    chunk_rows: int
    num_chunks: int
    compression: str

    @property
    def what(self) -> str:
        return f"{self.storage.url}/{self.key}"

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * self.array.row_bytes


def _open(stored: _StoredArray) -> _MappedArray | _FetchedArray:
    tail = index_size(stored.num_chunks)
    check_table(
        stored.table,
        num_stored=-(-stored.num_rows // stored.chunk_rows),
        num_bytes=stored.chunk_bytes,
        index_bytes=tail,
        compression=stored.compression,
        what=stored.what,
    )
    mapped = stored.storage.map(stored.key)
    size = stored.storage.size(stored.key) if mapped is None else len(mapped)
    _check_size(size or 0, stored.table, stored.what)
    if mapped is None:
        ranges = [(stored.table.size - tail, stored.table.size)]
        found = (stored.storage.get_ranges(stored.key, ranges) or [b""])[0]
    else:
        found = mapped[-tail:].tobytes()
    check_index(found, stored.table, num_chunks=stored.num_chunks, what=stored.what)
    if mapped is not None and stored.compression == "none":
        return _MappedArray(stored, mapped)
    return _FetchedArray(stored)


def _check_size(size: int, table: ChunkTable, what: str) -> None:
    if size != table.size:
        raise CorruptError(
            f"{what} has {size} bytes, but {table.size} were committed: it is missing, cut short "
            "or another object.",
            hint=REPAIR,
        )


class _MappedArray:
    """Rows through one strided view: chunk c, row r is view[c, r]."""

    def __init__(self, stored: _StoredArray, mapped: NDArray[np.uint8]) -> None:
        self._stored = stored
        self._mapped = mapped
        self._stride = stored.chunk_bytes + CRC_BYTES
        self._checked = np.zeros(len(stored.table.sizes), np.bool_)
        array = stored.array
        dtype = np.dtype(array.dtype).newbyteorder("<")
        inner = np.empty((2, *array.row_shape), dtype).strides
        self._view: NDArray[np.generic] = np.ndarray(
            shape=(len(stored.table.sizes), stored.chunk_rows, *array.row_shape),
            dtype=dtype,
            buffer=mapped.data,
            strides=(self._stride, *inner),
        )

    def slice(self, start: int, stop: int) -> NDArray[np.generic]:
        size = self._stored.chunk_rows
        first, last = start // size, (stop - 1) // size
        self._check(np.arange(first, last + 1))
        if first == last:
            return self._view[first, start - first * size : stop - first * size].copy()
        pieces = [
            self._view[chunk, max(start - chunk * size, 0) : stop - chunk * size]
            for chunk in range(first, last + 1)
        ]
        return np.concatenate(pieces)

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        chunks, inside = np.divmod(rows, self._stored.chunk_rows)
        self._check(np.unique(chunks))
        return self._view[chunks, inside]

    def _check(self, chunks: NDArray[np.int64]) -> None:
        for chunk in chunks[~self._checked[chunks]].tolist():
            offset = chunk * self._stride
            check_chunk(
                self._mapped[offset : offset + self._stride].data,
                checksum=int(self._stored.table.checksums[chunk]),
                what=f"chunk {chunk} of {self._stored.what}",
            )
            self._checked[chunk] = True


class _FetchedArray:
    """Rows through whole chunks, read in one request per call."""

    def __init__(self, stored: _StoredArray) -> None:
        self._stored = stored
        self._offsets = stored.table.offsets
        self._kept: OrderedDict[int, NDArray[np.generic]] = OrderedDict()

    def slice(self, start: int, stop: int) -> NDArray[np.generic]:
        size = self._stored.chunk_rows
        first, last = start // size, (stop - 1) // size
        chunks = self._chunks(list(range(first, last + 1)))
        rows = np.concatenate([chunks[chunk] for chunk in range(first, last + 1)])
        return rows[start - first * size : stop - first * size].copy()

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        numbers, inside = np.divmod(rows, self._stored.chunk_rows)
        chunks = self._chunks(np.unique(numbers).tolist())
        dtype = np.dtype(self._stored.array.dtype)
        out = np.empty((len(rows), *self._stored.array.row_shape), dtype)
        for number, chunk in chunks.items():
            where = numbers == number
            out[where] = chunk[inside[where]]
        return out

    def _chunks(self, numbers: list[int]) -> dict[int, NDArray[np.generic]]:
        found = {n: self._kept[n] for n in numbers if n in self._kept}
        missing = [n for n in numbers if n not in found]
        found.update(zip(missing, self._fetch(missing), strict=True))
        for number in numbers:
            self._kept[number] = found[number]
            self._kept.move_to_end(number)
        while len(self._kept) > KEPT_CHUNKS:
            self._kept.popitem(last=False)
        return found

    def _fetch(self, numbers: list[int]) -> list[NDArray[np.generic]]:
        stored, sizes = self._stored, self._stored.table.sizes
        if not numbers:
            return []
        ranges = [
            (int(self._offsets[n]), int(self._offsets[n] + sizes[n]) + CRC_BYTES) for n in numbers
        ]
        pieces = stored.storage.get_ranges(stored.key, ranges)
        if pieces is None:
            raise CorruptError(f"{stored.what} is gone.", hint=REPAIR)
        dtype = np.dtype(stored.array.dtype).newbyteorder("<")
        return [
            np.frombuffer(
                decode_chunk(
                    piece,
                    checksum=int(stored.table.checksums[number]),
                    compression=stored.compression,
                    num_bytes=stored.chunk_bytes,
                    what=f"chunk {number} of {stored.what}",
                ),
                dtype,
            ).reshape(stored.chunk_rows, *stored.array.row_shape)
            for number, piece in zip(numbers, pieces, strict=True)
        ]
