"""Reads the rows of one committed shard, each chunk checked before its first row is handed out.

An uncompressed shard on a local disk is one memory map per array, and reading a batch is one gather
from it into the caller's memory. Everything else is fetched by whole chunks, several in one
request, and kept until the process holds too many bytes of them. Rows are bytes here: the caller
knows their type.

Shape letters: B rows.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import CorruptError
from cache_service.format.commit import Commit
from cache_service.format.layout import CacheLayout
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
from cache_service.storage import Readable

DECODED_BYTES = 64 << 20
"""Decoded chunks that a process keeps: a shard of usual size. One larger chunk is kept, too."""

LARGE_ROW_BYTES = 8 << 10
"""8 KiB: rows from this size on are copied one by one, smaller ones by one index of many rows,
which copies them twice."""

Rows: TypeAlias = NDArray[np.void]
"""Rows of one array as they are stored, one element a row."""

Piece: TypeAlias = tuple[memoryview, int | None]
"""Bytes of consecutive rows, and their CRC-32C where it was committed: that of a whole chunk."""

Chunks: TypeAlias = NDArray[np.int64] | slice
"""Numbers of chunks within a shard."""


class DecodedChunks:
    """The chunks that were used last, up to a number of bytes. Threads may share it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.clear()

    def clear(self) -> None:
        """Forget everything, whoever holds the lock."""
        self._lock = threading.Lock()
        self._chunks: OrderedDict[Hashable, Rows] = OrderedDict()
        self._num_bytes = 0

    def get(self, keys: Sequence[Hashable]) -> list[Rows | None]:
        """The chunk of each key, None where it is not kept."""
        with self._lock:
            found = [self._chunks.get(key) for key in keys]
            for key, chunk in zip(keys, found, strict=True):
                if chunk is not None:
                    self._chunks.move_to_end(key)
        return found

    def put(self, key: Hashable, chunk: Rows) -> None:
        """Keep a chunk, and drop those that were not used for longest."""
        with self._lock:
            if key not in self._chunks:
                self._chunks[key] = chunk
                self._num_bytes += chunk.nbytes
            while self._num_bytes > self._max_bytes and len(self._chunks) > 1:
                self._num_bytes -= self._chunks.popitem(last=False)[1].nbytes


DECODED = DecodedChunks(DECODED_BYTES)
"""The decoded chunks of this process. A key begins with the object that identifies an opened cache,
so that two opened caches never share a chunk."""

# Another thread may hold the lock in the moment of a fork.
os.register_at_fork(after_in_child=DECODED.clear)


class ShardReader:
    """One shard, opened through its commit.

    `owner` identifies the opened cache. Its decoded chunks are kept when the reader is closed,
    until others replace them.
    """

    def __init__(
        self, storage: Readable, layout: CacheLayout, commit: Commit, *, owner: Hashable
    ) -> None:
        self._storage = storage
        self._layout = layout
        self._commit = commit
        self._owner = owner
        self._readers: dict[str, MappedArray | FetchedArray] = {}

    def read_into(self, start: int, stop: int, out: dict[str, Rows], at: int) -> None:
        """Copy rows [start, stop) of the shard into each array of `out`, from element `at` on."""
        for name, rows in out.items():
            self._reader(name).read_into(start, stop, rows[at : at + stop - start])

    def gather_into(
        self, positions_B: NDArray[np.int64], out: dict[str, Rows], where_B: NDArray[np.int64]
    ) -> None:
        """Copy scattered rows of the shard into the elements `where_B` of each array of `out`."""
        chunks_B, inside_B = np.divmod(positions_B, self._layout.spec.layout.chunk_rows)
        for name, rows in out.items():
            self._reader(name).gather_into(chunks_B, inside_B, rows, where_B)

    def pieces(self, name: str, start: int, stop: int) -> list[Piece]:
        """Rows [start, stop) of an array in pieces; not copied where it is mapped."""
        return self._reader(name).pieces(start, stop)

    def is_ready(self, names: Iterable[str], chunks: Chunks) -> bool:
        """Whether these chunks of every array are mapped and checked. Opens nothing."""
        readers = [self._readers.get(name) for name in names]
        return all(
            isinstance(reader, MappedArray) and reader.is_checked(chunks) for reader in readers
        )

    def prefetch(self, names: Iterable[str], start: int, num_bytes: int) -> None:
        """Check chunks from row `start` on, `num_bytes` of each mapped array: they are next."""
        for name in names:
            reader = self._reader(name)
            if isinstance(reader, MappedArray):
                reader.prefetch(start, num_bytes)

    def witnesses(self) -> NDArray[np.uint8]:
        """The whole views kept of this shard, uint8 [W, H, W, 3]."""
        table, shape = self._commit.objects["witness"], self._layout.witness_shape
        key = self._layout.object_key("witness", self._commit.seed, self._commit.shard)
        address = f"{self._storage.url}/{key}"
        num_bytes = math.prod(shape)
        check_table(
            table,
            num_stored=1,
            num_bytes=num_bytes,
            index_bytes=0,
            compression="zstd",
            what=address,
        )
        content = self._storage.get(key) or b""
        _check_size(len(content), table, address)
        payload = decode_chunk(
            content,
            checksum=int(table.checksums[0]),
            compression="zstd",
            num_bytes=num_bytes,
            what=address,
        )
        return np.frombuffer(payload, np.uint8).reshape(shape)

    def _reader(self, name: str) -> MappedArray | FetchedArray:
        if name not in self._readers:
            stored = StoredArray(self._storage, self._layout, self._commit, name)
            self._readers[name] = _open_array(stored, self._owner)
        return self._readers[name]


class StoredArray:
    """One array's object in one shard: where it lies, and what it must be."""

    def __init__(self, storage: Readable, layout: CacheLayout, commit: Commit, name: str) -> None:
        """Compare the commit's figures with the layout, before anything is read.

        Raises:
            CorruptError: no shard of this cache can have them.
        """
        spec = layout.spec
        start, stop = spec.shard_range(commit.shard)
        self.storage = storage
        self.key = layout.object_key(name, commit.seed, commit.shard)
        self.address = f"{storage.url}/{self.key}"
        self.table = commit.objects[name]
        self.num_chunks = layout.num_chunks
        self.chunk_rows = spec.layout.chunk_rows
        self.row_bytes = layout.by_name[name].row_bytes
        self.chunk_bytes = self.chunk_rows * self.row_bytes
        self.compression = spec.codec.compression
        check_table(
            self.table,
            num_stored=-(-(stop - start) // self.chunk_rows),
            num_bytes=self.chunk_bytes,
            index_bytes=index_size(self.num_chunks),
            compression=self.compression,
            what=self.address,
        )


class MappedArray:
    """Rows through a strided window over the map: a gather is one index of it."""

    def __init__(self, stored: StoredArray, mapped: NDArray[np.uint8]) -> None:
        self._stored = stored
        # Plain arrays over the same bytes: slicing a np.memmap costs ten times as much.
        self._mapped: NDArray[np.uint8] = np.ndarray(len(mapped), np.uint8, buffer=mapped.data)
        self._stride = stored.chunk_bytes + CRC_BYTES
        self._checked = np.zeros(len(stored.table.sizes), np.bool_)
        self._all_checked = False
        self._row_bytes = stored.row_bytes
        # A row begins at any byte, because checksums of 4 bytes lie between the chunks.
        self._window: Rows = np.ndarray(
            len(mapped) - self._row_bytes + 1,
            f"V{self._row_bytes}",
            buffer=mapped.data,
            strides=(1,),
        )

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        """Copy rows [start, stop) into `out`."""
        flat, done = out.view(np.uint8), 0
        for _, low, high in self._parts(start, stop):
            flat[done : done + high - low] = self._mapped[low:high]
            done += high - low

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Rows [start, stop) where they lie in the map, a piece per chunk."""
        checksums, size = self._stored.table.checksums, self._stored.chunk_bytes
        return [
            (self._mapped[low:high].data, int(checksums[chunk]) if high - low == size else None)
            for chunk, low, high in self._parts(start, stop)
        ]

    def gather_into(
        self,
        chunks_B: NDArray[np.int64],
        inside_B: NDArray[np.int64],
        out: Rows,
        where_B: NDArray[np.int64],
    ) -> None:
        """Copy rows by chunk and place in it into the elements `where_B` of `out`."""
        self._check(chunks_B)
        size, starts_B = self._row_bytes, chunks_B * self._stride + inside_B * self._row_bytes
        if size < LARGE_ROW_BYTES:
            out[where_B] = self._window[starts_B]
            return
        flat = out.view(np.uint8)
        for start, row in zip(starts_B.tolist(), where_B.tolist(), strict=True):
            flat[row * size : (row + 1) * size] = self._mapped[start : start + size]

    def is_checked(self, chunks: Chunks) -> bool:
        """Whether reading these chunks touches nothing but memory that was checked before."""
        return self._all_checked or bool(self._checked[chunks].all())

    def prefetch(self, start: int, num_bytes: int) -> None:
        """Check the chunks of so many bytes from row `start` on."""
        first = start // self._stored.chunk_rows
        self._check(slice(first, first + 1 + num_bytes // self._stride))

    def _parts(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(chunk, first byte, one after the last byte) of rows [start, stop), checked."""
        size, parts = self._stored.chunk_rows, []
        first, last = start // size, (stop - 1) // size
        self._check(slice(first, last + 1))
        for chunk in range(first, last + 1):
            low, high = max(start - chunk * size, 0), min(stop - chunk * size, size)
            offset = chunk * self._stride
            parts.append((chunk, offset + low * self._row_bytes, offset + high * self._row_bytes))
        return parts

    def _check(self, chunks: Chunks) -> None:
        """Hold those chunks that were not checked before against the commit."""
        if self.is_checked(chunks):
            return
        for chunk in np.unique(np.arange(len(self._checked))[chunks]).tolist():
            if self._checked[chunk]:
                continue
            offset = chunk * self._stride
            check_chunk(
                self._mapped[offset : offset + self._stride].data,
                checksum=int(self._stored.table.checksums[chunk]),
                what=f"chunk {chunk} of {self._stored.address}",
            )
            self._checked[chunk] = True
        self._all_checked = bool(self._checked.all())


class FetchedArray:
    """Rows through whole chunks, fetched in one request per call or taken from a map."""

    def __init__(
        self, stored: StoredArray, owner: Hashable, mapped: NDArray[np.uint8] | None = None
    ) -> None:
        self._stored = stored
        self._mapped = mapped
        self._offsets = stored.table.offsets
        self._owner = owner

    def read_into(self, start: int, stop: int, out: Rows) -> None:
        """Copy rows [start, stop) into `out`."""
        size = self._stored.chunk_rows
        numbers = list(range(start // size, (stop - 1) // size + 1))
        for number, chunk in zip(numbers, self._chunks(numbers), strict=True):
            first = number * size
            low, high = max(start, first), min(stop, first + size)
            out[low - start : high - start] = chunk[low - first : high - first]

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Rows [start, stop), copied into one piece whose checksum is not known."""
        rows: Rows = np.empty(stop - start, f"V{self._stored.row_bytes}")
        self.read_into(start, stop, rows)
        return [(rows.view(np.uint8).data, None)]

    def gather_into(
        self,
        chunks_B: NDArray[np.int64],
        inside_B: NDArray[np.int64],
        out: Rows,
        where_B: NDArray[np.int64],
    ) -> None:
        """Copy rows by chunk and place in it into the elements `where_B` of `out`."""
        order_B = np.argsort(chunks_B, kind="stable")
        numbers, starts = np.unique(chunks_B[order_B], return_index=True)
        chunks = self._chunks(numbers.tolist())
        for chunk, rows in zip(chunks, np.split(order_B, starts[1:]), strict=True):
            out[where_B[rows]] = chunk[inside_B[rows]]

    def _chunks(self, numbers: list[int]) -> list[Rows]:
        """Decoded chunks, fetched where they are not kept."""
        # A reader that was opened again may have the commit of another recording.
        checksums = self._stored.table.checksums
        keys = [(self._owner, self._stored.key, n, int(checksums[n])) for n in numbers]
        chunks = DECODED.get(keys)
        missing = [at for at, chunk in enumerate(chunks) if chunk is None]
        fetched = self._fetch([numbers[at] for at in missing])
        for at, chunk in zip(missing, fetched, strict=True):
            chunks[at] = chunk
            DECODED.put(keys[at], chunk)
        return [chunk for chunk in chunks if chunk is not None]

    def _fetch(self, numbers: list[int]) -> list[Rows]:
        stored, sizes = self._stored, self._stored.table.sizes
        if not numbers:
            return []
        ranges = [
            (int(self._offsets[n]), int(self._offsets[n] + sizes[n]) + CRC_BYTES) for n in numbers
        ]
        mapped = self._mapped
        if mapped is not None:
            contents = [mapped[start:stop].tobytes() for start, stop in ranges]
        elif (found := stored.storage.get_ranges(stored.key, ranges)) is not None:
            contents = found
        else:
            raise CorruptError(f"{stored.address} is gone.", hint=REPAIR)
        return [
            np.frombuffer(
                decode_chunk(
                    content,
                    checksum=int(stored.table.checksums[number]),
                    compression=stored.compression,
                    num_bytes=stored.chunk_bytes,
                    what=f"chunk {number} of {stored.address}",
                ),
                f"V{stored.row_bytes}",
            )
            for number, content in zip(numbers, contents, strict=True)
        ]


def _open_array(stored: StoredArray, owner: Hashable) -> MappedArray | FetchedArray:
    """Compare the object's size and index with the commit, and choose how to read it."""
    tail = index_size(stored.num_chunks)
    mapped = stored.storage.map(stored.key)
    size = stored.storage.size(stored.key) if mapped is None else len(mapped)
    _check_size(size or 0, stored.table, stored.address)
    if mapped is None:
        ranges = [(stored.table.size - tail, stored.table.size)]
        index = (stored.storage.get_ranges(stored.key, ranges) or [b""])[0]
    else:
        index = mapped[-tail:].tobytes()
    check_index(index, stored.table, num_chunks=stored.num_chunks, what=stored.address)
    if mapped is not None and stored.compression == "none":
        return MappedArray(stored, mapped)
    return FetchedArray(stored, owner, mapped)


def _check_size(size: int, table: ChunkTable, address: str) -> None:
    if size != table.size:
        raise CorruptError(
            f"{address} has {size} bytes, but {table.size} were committed: it is missing, cut "
            "short or another object.",
            hint=REPAIR,
        )
