"""Encodes rows as the bytes of one Zarr v3 shard object, and back. No I/O, no torch, no zarr.

A shard holds its inner chunks back to back in order, each followed by its CRC-32C (Zarr codecs
`bytes`, optionally `zstd`, then `crc32c`), and ends with the index: one little-endian pair
(offset, size) of uint64 per chunk and the CRC-32C of those pairs (`sharding_indexed`,
`index_location: end`). zarr-python writes the same bytes; a test compares them.

The table of chunks that `encode_shard` returns goes into the shard's commit. A reader checks each
chunk against the commit, not only against the CRC beside it: a valid chunk in the wrong place
passes the latter.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from cache_service.errors import CorruptError
from cache_service.format.canonical import Buffer, crc32c

CRC_BYTES = 4
_ABSENT = np.uint64(2**64 - 1)
_ZSTD = Zstd(level=3, checksum=False)

REPAIR = "Run `kd-cache verify CACHE --repair` and then the same `kd-cache build` again."
"""The hint after damage: repair drops the commits of damaged shards, build records them anew."""


class ChunkTable(NamedTuple):
    """What a shard object must look like: its size, and size and CRC-32C of each stored chunk.

    Attributes:
        size: bytes of the whole object.
        index_crc32c: CRC-32C of the index pairs.
        sizes: int64 [chunks], each chunk's bytes without its trailing CRC.
        checksums: uint32 [chunks], CRC-32C of those bytes.
    """

    size: int
    index_crc32c: int
    sizes: NDArray[np.int64]
    checksums: NDArray[np.uint32]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each chunk starts in the object, int64 [chunks]."""
        ends = np.cumsum(self.sizes + CRC_BYTES)
        return np.concatenate([np.zeros(1, np.int64), ends[:-1]])


def encode_shard(
    rows: NDArray[np.generic], *, shard_rows: int, chunk_rows: int, fill: object, compression: str
) -> tuple[bytes, ChunkTable]:
    """One shard object from the rows of its positions, [1 to shard_rows, ...].

    The last chunk is padded with `fill`; chunks beyond it are absent, as Zarr wants at the edge of
    an array.
    """
    num_stored = -(-len(rows) // chunk_rows)
    rows = rows.astype(rows.dtype.newbyteorder("<"), copy=False)
    pieces: list[bytes] = []
    sizes, checksums = np.zeros(num_stored, np.int64), np.zeros(num_stored, np.uint32)
    for chunk in range(num_stored):
        payload = _chunk_bytes(
            rows[chunk * chunk_rows : (chunk + 1) * chunk_rows], chunk_rows, fill
        )
        if compression == "zstd":
            payload = pack(payload)
        sizes[chunk], checksums[chunk] = len(payload), crc32c(payload)
        pieces += [payload, checksums[chunk].astype("<u4").tobytes()]
    index = _index_bytes(sizes, shard_rows // chunk_rows)
    index_crc = crc32c(index)
    pieces += [index, np.uint32(index_crc).astype("<u4").tobytes()]
    body = b"".join(pieces)
    return body, ChunkTable(len(body), index_crc, sizes, checksums)


def encode_packed_chunk(payload: bytes) -> tuple[bytes, ChunkTable]:
    """An object of one packed chunk and no index, as the witnesses of a shard are stored."""
    packed = pack(payload)
    size, checksum = len(packed), crc32c(packed)
    table = ChunkTable(
        size + CRC_BYTES, 0, np.array([size], np.int64), np.array([checksum], np.uint32)
    )
    return with_crc(packed), table


def _chunk_bytes(rows: NDArray[np.generic], chunk_rows: int, fill: object) -> bytes:
    if len(rows) == chunk_rows:
        return np.ascontiguousarray(rows).tobytes()
    padded = np.full((chunk_rows, *rows.shape[1:]), fill, rows.dtype)
    padded[: len(rows)] = rows
    return padded.tobytes()


def _index_bytes(sizes: NDArray[np.int64], num_chunks: int) -> bytes:
    pairs = np.full((num_chunks, 2), _ABSENT, np.dtype("<u8"))
    ends = np.cumsum(sizes + CRC_BYTES)
    pairs[: len(sizes), 1] = sizes + CRC_BYTES
    pairs[: len(sizes), 0] = ends - pairs[: len(sizes), 1].astype(np.int64)
    return pairs.tobytes()


def check_table(
    table: ChunkTable,
    *,
    num_stored: int,
    num_bytes: int,
    index_bytes: int,
    compression: str,
    what: str,
) -> None:
    """Compare a commit's table with the layout, before memory is allocated by its figures.

    `num_stored` chunks hold rows of this shard, each of `num_bytes` when unpacked; `index_bytes` is
    0 where the object is one chunk without an index.

    Raises:
        CorruptError: no writer of this format makes such a table.
    """
    low, high = num_bytes, num_bytes
    if compression == "zstd":
        # zstd adds at most one byte in 256 to what it cannot pack, and a header.
        low, high = 1, num_bytes + num_bytes // 128 + 1024
    in_bounds = bool(np.all((table.sizes >= low) & (table.sizes <= high)))
    total = int(np.sum(table.sizes + CRC_BYTES)) + index_bytes
    if not in_bounds or len(table.sizes) != num_stored or table.size != total:
        raise CorruptError(
            f"the commit gives {what} a size that no shard of this cache can have.", hint=REPAIR
        )


def check_chunk(stored: Buffer, *, checksum: int, what: str) -> None:
    """Compare one stored chunk, its trailing CRC included, with its commit.

    Raises:
        CorruptError: the bytes are not those that the commit names.
    """
    view = memoryview(stored)
    found = crc32c(view[:-CRC_BYTES])
    trailer = int.from_bytes(view[-CRC_BYTES:], "little")
    if found != checksum or trailer != checksum:
        raise CorruptError(
            f"{what} is not what was committed: CRC-32C {found:08x}, committed {checksum:08x}.",
            hint=REPAIR,
        )


def decode_chunk(
    stored: Buffer, *, checksum: int, compression: str, num_bytes: int, what: str
) -> bytes:
    """The payload of one stored chunk, its trailing CRC included, checked against its commit.

    Memory is allocated by `num_bytes`, never by a figure that the stored bytes declare.

    Raises:
        CorruptError: the bytes are not those that the commit names, or unpack to another size.
    """
    check_chunk(stored, checksum=checksum, what=what)
    payload = bytes(memoryview(stored)[:-CRC_BYTES])
    if compression == "zstd":
        return _unpack(payload, num_bytes, what)
    if len(payload) != num_bytes:
        raise CorruptError(f"{what} holds {len(payload)} bytes, not {num_bytes}.", hint=REPAIR)
    return payload


def _unpack(packed: bytes, num_bytes: int, what: str) -> bytes:
    try:
        # A frame that holds less than declared would leave zeros at the end of the buffer.
        if _declared_size(packed) != num_bytes:
            raise ValueError("size")
        out = bytearray(num_bytes)
        _ZSTD.decode(packed, out)
    except (RuntimeError, ValueError, IndexError) as problem:
        raise CorruptError(
            f"{what} does not unpack to {num_bytes} bytes.", hint=REPAIR
        ) from problem
    return bytes(out)


def _declared_size(frame: bytes) -> int:
    """Bytes that a zstd frame declares, 0 where it declares none. Source: RFC 8878, 3.1.1.1."""
    descriptor = frame[4]
    flag, single_segment = descriptor >> 6, descriptor >> 5 & 1
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    width = (single_segment, 2, 4, 8)[flag]
    value = int.from_bytes(frame[start : start + width], "little")
    return value + 256 if flag == 1 else value


def pack(payload: bytes) -> bytes:
    """One zstd frame, as Zarr's `zstd` codec at level 3 writes it."""
    packed: bytes = _ZSTD.encode(payload)
    return packed


def check_index(tail: bytes, table: ChunkTable, *, num_chunks: int, what: str) -> None:
    """Compare a shard's stored index with its commit: other Zarr readers find chunks by it.

    `tail` is the object's last `index_size(num_chunks)` bytes. Raises CorruptError.
    """
    expected = _index_bytes(table.sizes, num_chunks)
    if tail != expected + table.index_crc32c.to_bytes(CRC_BYTES, "little"):
        raise CorruptError(f"the index of {what} is not what was committed.", hint=REPAIR)


def index_size(num_chunks: int) -> int:
    """Bytes of the index at the end of a shard object, its CRC included."""
    return 16 * num_chunks + CRC_BYTES


def with_crc(payload: bytes) -> bytes:
    """A chunk as Zarr's `crc32c` codec stores it."""
    return payload + crc32c(payload).to_bytes(CRC_BYTES, "little")
