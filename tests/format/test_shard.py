"""A shard's bytes are zarr-python's own, and nothing else passes for them."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.caches import make_rows, make_spec, make_witnesses
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from cache_service.errors import CorruptError
from cache_service.format.canonical import crc32c
from cache_service.format.layout import CacheLayout
from cache_service.format.shard import (
    CRC_BYTES,
    check_chunk,
    check_index,
    check_table,
    decode_chunk,
    encode_shard,
    index_size,
    pack,
    with_crc,
)

CODECS = {
    "dense": {"kind": "dense"},
    "dense-zstd": {"kind": "dense", "compression": "zstd"},
    "int8-zstd": {"kind": "int8", "compression": "zstd"},
    "topk": {"kind": "topk", "k": 4},
}


class ZarrTwin:
    """The same array in memory, written by zarr-python from the same metadata."""

    def __init__(self, document: bytes) -> None:
        self.store = MemoryStore()
        self._set("zarr.json", document)
        self.array = zarr.open_array(self.store, mode="r+")

    def get(self, key: str) -> bytes:
        found = sync(self.store.get(key, default_buffer_prototype()))
        assert found is not None, key
        return found.to_bytes()

    def _set(self, key: str, content: bytes) -> None:
        sync(self.store.set(key, default_buffer_prototype().buffer.from_bytes(content)))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
def test_full_and_partial_shards_are_the_bytes_that_zarr_python_writes(codec):
    spec = make_spec(codec=codec, num_samples=100)  # 3 full shards of 32 and one of 4 rows
    rows, documents = make_rows(spec, 0), CacheLayout(spec).documents(1)
    for array in CacheLayout(spec).arrays:
        twin = ZarrTwin(documents[f"{array.name}/zarr.json"])
        twin.array[0] = rows[array.name]
        for shard in range(spec.num_shards):
            start, stop = spec.shard_range(shard)
            body, _ = encode_shard(
                rows[array.name][start:stop],
                shard_rows=spec.layout.shard_rows,
                chunk_rows=spec.layout.chunk_rows,
                fill=array.fill,
                compression=spec.codec.compression,
            )
            key = CacheLayout(spec).object_key(array.name, 0, shard).removeprefix(f"{array.name}/")
            assert body == twin.get(key), (array.name, shard)


def test_witnesses_are_the_bytes_that_zarr_python_writes():
    spec = make_spec()
    twin = ZarrTwin(CacheLayout(spec).documents(1)["witness/zarr.json"])
    views = make_witnesses(spec, 0, 1)
    twin.array[0, 1] = views
    key = CacheLayout(spec).object_key("witness", 0, 1).removeprefix("witness/")
    assert with_crc(pack(views.tobytes())) == twin.get(key)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 32),
    chunk_rows=st.sampled_from([1, 2, 4, 8, 16, 32]),
    compression=st.sampled_from(["none", "zstd"]),
    seed=st.integers(0, 2**16),
)
def test_every_chunk_comes_back_from_where_its_table_says(rows, chunk_rows, compression, seed):
    values = np.random.default_rng(seed).integers(-9, 9, (rows, 3)).astype(np.int32)
    body, table = encode_shard(
        values, shard_rows=32, chunk_rows=chunk_rows, fill=-1, compression=compression
    )
    num_bytes, tail = chunk_rows * 12, index_size(32 // chunk_rows)
    check_table(
        table,
        num_stored=-(-rows // chunk_rows),
        num_bytes=num_bytes,
        index_bytes=tail,
        compression=compression,
        what="it",
    )
    check_index(body[-tail:], table, num_chunks=32 // chunk_rows, what="it")
    assert table.size == len(body)
    read = b"".join(
        decode_chunk(
            body[offset : offset + size + CRC_BYTES],
            checksum=int(checksum),
            compression=compression,
            num_bytes=num_bytes,
            what="it",
        )
        for offset, size, checksum in zip(table.offsets, table.sizes, table.checksums, strict=True)
    )
    found = np.frombuffer(read, np.int32).reshape(-1, 3)
    np.testing.assert_array_equal(found[:rows], values)
    assert (found[rows:] == -1).all(), "the last chunk is padded with the fill value"


def test_a_chunk_with_any_bit_flipped_is_refused():
    chunk = with_crc(b"\x00\x01rows")
    checksum = crc32c(b"\x00\x01rows")
    check_chunk(chunk, checksum=checksum, what="chunk 0")
    for bit in range(8 * len(chunk)):
        flipped = bytearray(chunk)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptError, match="chunk 0 is not what was committed: CRC-32C"):
            check_chunk(bytes(flipped), checksum=checksum, what="chunk 0")


def test_a_valid_chunk_of_another_place_is_refused():
    with pytest.raises(CorruptError, match="committed"):
        check_chunk(with_crc(b"other rows"), checksum=crc32c(b"these rows"), what="chunk 0")


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 5])
def test_a_chunk_cut_short_is_refused(cut):
    with pytest.raises(CorruptError, match="chunk 0 is not what was committed: CRC-32C"):
        check_chunk(with_crc(b"rows")[:cut], checksum=crc32c(b"rows"), what="chunk 0")


def test_an_index_with_any_bit_flipped_is_refused():
    body, table = encode_shard(
        np.arange(12), shard_rows=16, chunk_rows=4, fill=0, compression="none"
    )
    tail = body[-index_size(4) :]
    check_index(tail, table, num_chunks=4, what="it")
    for bit in range(8 * len(tail)):
        flipped = bytearray(tail)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptError, match="the index of it is not what was committed"):
            check_index(bytes(flipped), table, num_chunks=4, what="it")


@pytest.mark.parametrize("held", [50, 99, 101, 1 << 24])
def test_a_frame_that_unpacks_to_another_size_is_refused_before_memory_is_taken(held):
    packed = pack(bytes(held))
    with pytest.raises(CorruptError, match="does not unpack to 100 bytes"):
        decode_chunk(
            with_crc(packed),
            checksum=crc32c(packed),
            compression="zstd",
            num_bytes=100,
            what="chunk 0",
        )


@pytest.mark.parametrize(
    "packed",
    [b"", b"\x28\xb5\x2f\xfd", b"no frame at all", pack(bytes(60)) + pack(bytes(40))],
    ids=["empty", "magic only", "text", "two frames"],
)
def test_what_is_no_single_frame_is_refused(packed):
    with pytest.raises(CorruptError, match="does not unpack to 100 bytes"):
        decode_chunk(
            with_crc(packed),
            checksum=crc32c(packed),
            compression="zstd",
            num_bytes=100,
            what="chunk 0",
        )


@pytest.mark.parametrize(
    "change",
    [
        {"size": 10**12},
        {"sizes": np.array([32, 32, 10**11])},
        {"sizes": np.array([32, 32, -32])},
        {"sizes": np.array([32, 32, 0])},
        {"sizes": np.array([32, 32])},
        {"sizes": np.zeros(0, np.int64)},
    ],
    ids=str,
)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_table_that_no_shard_can_have_is_refused_before_a_byte_is_read(change, compression):
    _, table = encode_shard(np.arange(12), shard_rows=16, chunk_rows=4, fill=0, compression="none")
    with pytest.raises(CorruptError, match="the commit gives it a size that no shard"):
        check_table(
            table._replace(**change),
            num_stored=3,
            num_bytes=32,
            index_bytes=index_size(4),
            compression=compression,
            what="it",
        )
