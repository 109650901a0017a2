"""Rows of one committed shard, each chunk checked before its first row is handed out.

An uncompressed shard on a local disk is one memory map, and reading a batch is one gather from it
into the caller's memory. Everything else is read by whole chunks, several in one request, with the
last few kept. Rows are bytes here: what they mean is the caller's.

Shape letters: B rows.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import CorruptError
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
from cache_service.reader_memory import CheckedMap, NotAtHandError, Rows, gather_mapped
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

    def read_into(
        self, start: int, stop: int, out: dict[str, Rows], at: int, *, at_hand: bool
    ) -> None:
        """Copy rows [start, stop) of the shard into each array of `out`, from element `at` on."""
        for name, rows in out.items():
            reader = self._reader(name, at_hand=at_hand)
            reader.read_into(start, stop, rows[at : at + stop - start], at_hand=at_hand)

    def gather_into(
        self,
        positions: NDArray[np.int64],
        out: dict[str, Rows],
        where: NDArray[np.int64],
        *,
        at_hand: bool,
    ) -> None:
        """Copy scattered rows of the shard into the elements `where` of each array of `out`."""
        chunks, inside = np.divmod(positions, self._spec.layout.chunk_rows)
        for name, rows in out.items():
            reader = self._reader(name, at_hand=at_hand)
            rows[where] = reader.gather(chunks, inside, at_hand=at_hand)

    def checked_maps(self, names: Iterable[str]) -> list[CheckedMap] | None:
        """These arrays in memory; None unless all of them are mapped and checked throughout."""
        maps = []
        for name in names:
            reader = self._readers.get(name)
            found = reader.checked_map() if isinstance(reader, _MappedArray) else None
            if found is None:
                return None
            maps.append(found)
        return maps

    def check_ahead(self, names: Iterable[str], start: int, num_bytes: int) -> None:
        """Check chunks from row `start` on, so many bytes of each array: they are read next."""
        for name in names:
            reader = self._reader(name, at_hand=False)
            if isinstance(reader, _MappedArray):
                reader.check_ahead(start, num_bytes)

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

    def _reader(self, name: str, *, at_hand: bool) -> _MappedArray | _FetchedArray:
        if name not in self._readers:
            if at_hand:
                raise NotAtHandError
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


def gather_across(
    shards: Sequence[ShardRows],
    which: NDArray[np.int64],
    places: tuple[NDArray[np.int64], NDArray[np.int64]],
    names: Sequence[str],
) -> dict[str, Rows] | None:
    """Scattered rows of shards; None unless all of their arrays are mapped and checked.

    `which` has the index into `shards`, and `places` the chunk and the row in it, of each row.
    """
    found = [shard.checked_maps(names) for shard in shards]
    maps = [each for each in found if each is not None]
    if not maps or len(maps) < len(found):
        return None
    columns = zip(*maps, strict=True)
    return {name: gather_mapped(next(columns), which, *places) for name in names}


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
    """Rows through a window that begins at any byte of the map: a gather is one index of it."""

    def __init__(self, stored: _StoredArray, mapped: NDArray[np.uint8]) -> None:
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

    def gather(
        self, chunks: NDArray[np.int64], inside: NDArray[np.int64], *, at_hand: bool
    ) -> Rows:
        self._make_sure(chunks, at_hand=at_hand)
        first_bytes = chunks * self._stride + inside * self._row_bytes
        rows: Rows = self._window[first_bytes]
        return rows

    def checked_map(self) -> CheckedMap | None:
        if self._whole is None and self._checked.all():
            address = self._mapped.ctypes.data
            self._whole = CheckedMap(self._mapped, address, self._stride, self._row_bytes)
        return self._whole

    def check_ahead(self, start: int, num_bytes: int) -> None:
        first = start // self._stored.chunk_rows
        self._make_sure(slice(first, first + 1 + num_bytes // self._stride), at_hand=False)

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


class _FetchedArray:
    """Rows through whole chunks, read in one request per call."""

    def __init__(self, stored: _StoredArray) -> None:
        self._stored = stored
        self._offsets = stored.table.offsets
        self._kept: OrderedDict[int, Rows] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, start: int, stop: int, out: Rows, *, at_hand: bool) -> None:
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
        if at_hand:
            raise NotAtHandError
        out = np.empty(len(chunks), f"V{self._stored.array.row_bytes}")
        for number, chunk in self._chunks(np.unique(chunks).tolist()).items():
            where = chunks == number
            out[where] = chunk[inside[where]]
        return out

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
