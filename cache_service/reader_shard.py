"""Rows of one committed shard, each chunk checked before its first row is handed out.

An uncompressed shard on a local disk is one memory map, and reading a batch is one gather from it
into the caller's memory. Everything else is read by whole chunks, several in one request, with the
last few kept. Rows are bytes here: what they mean is the caller's.

Shape letters: B rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cache_service.format.commit import Commit
from cache_service.format.layout import (
    object_key,
    row_arrays,
    witness_key,
    witness_shape,
)
from cache_service.format.shard import (
    check_table,
    decode_chunk,
)
from cache_service.format.spec import CacheSpec
from cache_service.reader_arrays import (
    FetchedArray,
    MappedArray,
    StoredArray,
    check_size,
    open_array,
)
from cache_service.reader_memory import CheckedMap, NotAtHandError, Piece, Rows
from cache_service.storage import Storage


class ShardRows:
    """One shard, opened through its commit."""

    def __init__(self, storage: Storage, spec: CacheSpec, commit: Commit) -> None:
        self._storage = storage
        self._spec = spec
        self._commit = commit
        self._specs = {array.name: array for array in row_arrays(spec)}
        self._readers: dict[str, MappedArray | FetchedArray] = {}

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

    def pieces(self, name: str, start: int, stop: int) -> list[Piece]:
        """Rows [start, stop) of an array in pieces: where they lie if it is mapped, else copied."""
        return self._reader(name, at_hand=False).pieces(start, stop)

    def is_ready(self, names: Iterable[str], chunks: NDArray[np.int64] | slice) -> bool:
        """Whether these chunks of every array are mapped and checked."""
        readers = [self._readers.get(name) for name in names]
        return all(reader is not None and reader.is_ready(chunks) for reader in readers)

    def checked_maps(self, names: Iterable[str]) -> dict[str, CheckedMap] | None:
        """These arrays in memory; None unless all of them are mapped and checked throughout."""
        maps = {}
        for name in names:
            reader = self._readers.get(name)
            found = reader.checked_map() if isinstance(reader, MappedArray) else None
            if found is None:
                return None
            maps[name] = found
        return maps

    def check_ahead(self, names: Iterable[str], start: int, num_bytes: int) -> None:
        """Check chunks from row `start` on, so many bytes of each array: they are read next."""
        for name in names:
            reader = self._reader(name, at_hand=False)
            if isinstance(reader, MappedArray):
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
        check_size(len(content), table, what)
        payload = decode_chunk(
            content,
            checksum=int(table.checksums[0]),
            compression="zstd",
            num_bytes=math.prod(shape),
            what=what,
        )
        return np.frombuffer(payload, np.uint8).reshape(shape)

    def _reader(self, name: str, *, at_hand: bool) -> MappedArray | FetchedArray:
        if name not in self._readers:
            if at_hand:
                raise NotAtHandError
            array = self._specs[name]
            start, stop = self._spec.shard_range(self._commit.shard)
            stored = StoredArray(
                storage=self._storage,
                key=object_key(array, self._commit.seed, self._commit.shard),
                array=array,
                table=self._commit.objects[name],
                num_rows=stop - start,
                chunk_rows=self._spec.layout.chunk_rows,
                num_chunks=self._spec.layout.shard_rows // self._spec.layout.chunk_rows,
                compression=self._spec.codec.compression,
            )
            self._readers[name] = open_array(stored)
        return self._readers[name]
