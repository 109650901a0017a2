"""Chunks that must be fetched or unpacked are kept, within a number of bytes for the process."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import support.repeatable  # noqa: F401  loads the profile of the property tests
from hypothesis import given
from hypothesis import strategies as st
from support.caches import make_spec, write_cache

from cache_service.errors import CorruptError
from cache_service.format.shard import decode_chunk
from cache_service.rows import shard_reader
from cache_service.rows.reader import open_cache
from cache_service.rows.shard_reader import DecodedChunks

CHUNK_BYTES = 8 * 16 * 6 * 2
"""Of `logits`: 8 rows of 16 cells of 6 classes in float16."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same rows twice: (uncompressed, zstd)."""
    urls = []
    for compression in ("none", "zstd"):
        spec = make_spec(codec={"kind": "dense", "compression": compression}, chunk_rows=8)
        urls.append(str(tmp_path_factory.mktemp(compression)))
        write_cache(urls[-1], spec)
    return urls


def keep(monkeypatch, max_bytes: int) -> DecodedChunks:
    store = DecodedChunks(max_bytes)
    monkeypatch.setattr(shard_reader, "DECODED", store)
    return store


@pytest.mark.parametrize("max_bytes", [1, 3 * CHUNK_BYTES, 1 << 20])
def test_scattered_rows_are_those_of_an_uncompressed_cache_however_few_are_kept(
    written, monkeypatch, max_bytes
):
    keep(monkeypatch, max_bytes)
    plain, packed = (open_cache(url) for url in written)

    @given(st.lists(st.integers(0, 99), min_size=1, max_size=40))
    def check(positions):
        where = np.array(positions, np.int64)
        wanted, found = plain.gather(0, where), packed.gather(0, where)
        assert wanted.keys() == found.keys()
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name], values)

    check()


@pytest.mark.parametrize("order", ["ascending", "random"])
def test_a_chunk_is_decoded_once_for_rows_one_at_a_time(written, monkeypatch, order):
    keep(monkeypatch, 1 << 20)
    cache = open_cache(written[1])
    decoded = []

    def counting(*args, **kwargs):
        decoded.append(kwargs["what"])
        return decode_chunk(*args, **kwargs)

    monkeypatch.setattr(shard_reader, "decode_chunk", counting)
    positions = np.arange(100)
    if order == "random":
        positions = np.random.default_rng(0).permutation(positions)
    for position in positions:
        cache.gather(0, position[None], arrays=("logits",))
    assert len(decoded) == len(set(decoded)) == -(-100 // 8)


def test_no_more_bytes_are_kept_than_allowed_and_the_last_used_ones(monkeypatch):
    store = DecodedChunks(100)
    chunks = [np.zeros(4, "V10") for _ in range(4)]
    for number in (0, 1):
        store.put(number, chunks[number])
    assert store.get([0])[0] is chunks[0]  # now 1 was not used for longest
    store.put(2, chunks[2])
    found = store.get([0, 1, 2])
    assert (found[0] is chunks[0], found[1], found[2] is chunks[2]) == (True, None, True)
    store.put(3, np.zeros(11, "V10"))
    kept = store.get([0, 2, 3])
    assert [chunk is None for chunk in kept] == [True, True, False], (
        "a chunk above the bound is kept alone"
    )


def test_a_chunk_that_is_put_twice_counts_once():
    store = DecodedChunks(100)
    for key in (0, 1, 1, 1):
        store.put(key, np.zeros(5, "V10"))
    assert all(chunk is not None for chunk in store.get([0, 1]))


def test_a_cache_that_is_opened_again_reads_its_chunks_again(tmp_path):
    url = str(tmp_path / "cache")
    write_cache(url, make_spec(codec={"kind": "dense", "compression": "zstd"}))
    first = open_cache(url).read(0, 0, 100)
    damaged = next(
        path for path in sorted((tmp_path / "cache/logits/c/0/0").rglob("*")) if path.is_file()
    )
    content = bytearray(damaged.read_bytes())
    content[20] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CorruptError):
        open_cache(url).read(0, 0, 100)
    assert len(first["logits"]) == 100


def test_a_shard_that_was_recorded_anew_is_not_read_from_the_chunks_of_before(tmp_path):
    spec = make_spec(codec={"kind": "dense", "compression": "zstd"})
    write_cache(str(tmp_path / "cache"), spec)
    cache = open_cache(str(tmp_path / "cache"), open_shards=1)
    before = cache.read(0, 0, 8)["logits"]
    shutil.rmtree(tmp_path / "cache")
    write_cache(str(tmp_path / "cache"), spec, salt=1)
    cache.read(0, 92, 100)  # another shard, for which the first one is closed
    after = cache.read(0, 0, 8)["logits"]
    np.testing.assert_array_equal(
        after, open_cache(str(tmp_path / "cache")).read(0, 0, 8)["logits"]
    )
    assert not np.array_equal(after, before)


def test_a_forked_child_starts_empty_whoever_held_the_lock():
    store = shard_reader.DECODED
    store.put("before the fork", np.zeros(1, "V4"))
    with store._lock:
        child = os.fork()
        if child == 0:
            os._exit(7 if store.get(["before the fork"]) == [None] else 1)
        status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 7
