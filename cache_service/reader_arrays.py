"""One array of one shard: mapped into memory, or fetched chunk by chunk.

Every chunk is checked before its first row is handed out.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import CorruptError
from cache_service.format.layout import RowArray
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
from cache_service.reader_memory import CheckedMap, NotAtHandError, Piece, Rows
from cache_service.storage import Storage

KEPT_CHUNKS = 4
"""Decoded chunks kept per array. A sequential scan needs one, a batch across an edge two."""


class StoredArray(NamedTuple):
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
        """Its address, for messages."""
        return f"{self.storage.url}/{self.key}"

    @property
    def chunk_bytes(self) -> int:
        """Of one chunk, uncompressed and without its checksum."""
        return self.chunk_rows * self.array.row_bytes


def open_array(stored: StoredArray) -> MappedArray | FetchedArray:
    """An array of a committed shard, its size and index held against the commit.

    Raises:
        CorruptError: they are not what was committed.
    """
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
    check_size(size or 0, stored.table, stored.what)
    if mapped is None:
        ranges = [(stored.table.size - tail, stored.table.size)]
        found = (stored.storage.get_ranges(stored.key, ranges) or [b""])[0]
    else:
        found = mapped[-tail:].tobytes()
    check_index(found, stored.table, num_chunks=stored.num_chunks, what=stored.what)
    if mapped is not None and stored.compression == "none":
        return MappedArray(stored, mapped)
    return FetchedArray(stored)


def check_size(size: int, table: ChunkTable, what: str) -> None:
    """Raise CorruptError where an object has another size than was committed."""
    if size != table.size:
        raise CorruptError(
            f"{what} has {size} bytes, but {table.size} were committed: it is missing, cut short "
            "or another object.",
            hint=REPAIR,
        )


class MappedArray:
    """Rows through a window that begins at any byte of the map: a gather is one index of it."""

    def __init__(self, stored: StoredArray, mapped: NDArray[np.uint8]) -> None:
        self._stored = stored
        # Plain arrays over the same bytes: slicing a np.memmap costs ten times as much.
        self._mapped: NDArray[np.uint8] = np.ndarray(len(mapped), np.uint8, buffer=mapped.data)
        self._stride = stored.chunk_bytes + CRC_BYTES
        self._checked = np.zeros(len(stored.table.sizes), np.bool_)
        self._row_bytes = stored.array.row_bytes
        self._whole: CheckedMap | None = None
        self._window: Rows = np.ndarray(
            len(mapped) - self._row_bytes + 1,
            f"V{self._row_bytes}",
            buffer=mapped.data,
            strides=(1,),
        )

    def read_into(self, start: int, stop: int, out: Rows, *, at_hand: bool) -> None:
        """Copy rows [start, stop) into `out`; NotAtHandError where storage would be read."""
        size, row_bytes = self._stored.chunk_rows, self._row_bytes
        first, last = start // size, (stop - 1) // size
        self._make_sure(slice(first, last + 1), at_hand=at_hand)
        flat, done = out.view(np.uint8), 0
        for chunk in range(first, last + 1):
            low, high = max(start - chunk * size, 0), min(stop - chunk * size, size)
            offset, count = chunk * self._stride, (high - low) * row_bytes
            low_byte = offset + low * row_bytes
            flat[done : done + count] = self._mapped[low_byte : low_byte + count]
            done += count

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Rows [start, stop) where they lie in the map; chunks are checked first."""
        size, row_bytes = self._stored.chunk_rows, self._row_bytes
        first, last = start // size, (stop - 1) // size
        self._make_sure(slice(first, last + 1), at_hand=False)
        found: list[Piece] = []
        for chunk in range(first, last + 1):
            low, high = max(start - chunk * size, 0), min(stop - chunk * size, size)
            offset = chunk * self._stride
            content = self._mapped[offset + low * row_bytes : offset + high * row_bytes].data
            whole = high - low == size
            found.append((content, int(self._stored.table.checksums[chunk]) if whole else None))
        return found

    def gather(
        self, chunks: NDArray[np.int64], inside: NDArray[np.int64], *, at_hand: bool
    ) -> Rows:
        """Rows by chunk and place in it. Raises as `read_into`."""
        self._make_sure(chunks, at_hand=at_hand)
        first_bytes = chunks * self._stride + inside * self._row_bytes
        rows: Rows = self._window[first_bytes]
        return rows

    def checked_map(self) -> CheckedMap | None:
        """The whole array, once every chunk has been checked."""
        if self._whole is None and self._checked.all():
            self._whole = CheckedMap(
                mapped=self._mapped,
                address=self._mapped.ctypes.data,
                num_chunks=len(self._checked),
                stride=self._stride,
                row_bytes=self._row_bytes,
            )
        return self._whole

    def check_ahead(self, start: int, num_bytes: int) -> None:
        """Check the chunks of so many bytes from row `start` on."""
        first = start // self._stored.chunk_rows
        self._make_sure(slice(first, first + 1 + num_bytes // self._stride), at_hand=False)

    def is_ready(self, chunks: NDArray[np.int64] | slice) -> bool:
        """Whether those chunks have been checked, so that reading them touches no storage."""
        return bool(self._checked[chunks].all())

    def _make_sure(self, chunks: NDArray[np.int64] | slice, *, at_hand: bool) -> None:
        """Check those chunks that nobody has checked yet."""
        if self._checked[chunks].all():
            return
        if at_hand:
            raise NotAtHandError
        for chunk in np.unique(np.arange(len(self._checked))[chunks]).tolist():
            if self._checked[chunk]:
                continue
            offset = chunk * self._stride
            check_chunk(
                self._mapped[offset : offset + self._stride].data,
                checksum=int(self._stored.table.checksums[chunk]),
                what=f"chunk {chunk} of {self._stored.what}",
            )
            self._checked[chunk] = True


class FetchedArray:
    """Rows through whole chunks, read in one request per call."""

    def __init__(self, stored: StoredArray) -> None:
        self._stored = stored
        self._offsets = stored.table.offsets
        self._kept: OrderedDict[int, Rows] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, start: int, stop: int, out: Rows, *, at_hand: bool) -> None:
        """As MappedArray's; never at hand."""
        if at_hand:
            raise NotAtHandError
        size = self._stored.chunk_rows
        for number, chunk in self._chunks(
            list(range(start // size, (stop - 1) // size + 1))
        ).items():
            first = number * size
            low, high = max(start, first), min(stop, first + size)
            out[low - start : high - start] = chunk[low - first : high - first]

    def gather(
        self, chunks: NDArray[np.int64], inside: NDArray[np.int64], *, at_hand: bool
    ) -> Rows:
        """As MappedArray's; never at hand."""
        if at_hand:
            raise NotAtHandError
        out = np.empty(len(chunks), f"V{self._stored.array.row_bytes}")
        for number, chunk in self._chunks(np.unique(chunks).tolist()).items():
            where = chunks == number
            out[where] = chunk[inside[where]]
        return out

    def is_ready(self, chunks: NDArray[np.int64] | slice) -> bool:  # noqa: ARG002  as MappedArray's
        """Always False: chunks are fetched from storage."""
        return False

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Rows [start, stop), copied; their checksum is not known."""
        rows: Rows = np.empty(stop - start, f"V{self._stored.array.row_bytes}")
        self.read_into(start, stop, rows, at_hand=False)
        return [(rows.view(np.uint8).data, None)]

    def _chunks(self, numbers: list[int]) -> dict[int, Rows]:
        with self._lock:
            found = {n: self._kept[n] for n in numbers if n in self._kept}
        missing = [n for n in numbers if n not in found]
        found.update(zip(missing, self._fetch(missing), strict=True))
        with self._lock:
            for number in numbers:
                self._kept[number] = found[number]
                self._kept.move_to_end(number)
            while len(self._kept) > KEPT_CHUNKS:
                self._kept.popitem(last=False)
        return found

    def _fetch(self, numbers: list[int]) -> list[Rows]:
        stored, sizes = self._stored, self._stored.table.sizes
        if not numbers:
            return []
        ranges = [
            (int(self._offsets[n]), int(self._offsets[n] + sizes[n]) + CRC_BYTES) for n in numbers
        ]
        pieces = stored.storage.get_ranges(stored.key, ranges)
        if pieces is None:
            raise CorruptError(f"{stored.what} is gone.", hint=REPAIR)
        return [
            np.frombuffer(
                decode_chunk(
                    piece,
                    checksum=int(stored.table.checksums[number]),
                    compression=stored.compression,
                    num_bytes=stored.chunk_bytes,
                    what=f"chunk {number} of {stored.what}",
                ),
                f"V{stored.array.row_bytes}",
            )
            for number, piece in zip(numbers, pieces, strict=True)
        ]
