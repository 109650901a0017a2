"""Rows out of the map by every way there is, against the rows that were written."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import support.repeatable  # noqa: F401  loads the profile of the property tests
from hypothesis import given
from hypothesis import strategies as st
from support.caches import make_spec, write_cache

from cache_service.format.canonical import crc32c
from cache_service.rows import shard_reader
from cache_service.rows.reader import open_cache
from cache_service.rows.shard_reader import LARGE_ROW_BYTES
from cache_service.storage.local import LocalStorage

NAMES = st.lists(st.sampled_from(["sample", "digest", "origin"]), unique=True, min_size=1)


def assert_same(found, wanted, names):
    assert list(found) == list(names)
    for name in names:
        assert found[name].dtype == wanted[name].dtype
        assert found[name].shape == wanted[name].shape
        assert found[name].tobytes() == wanted[name].tobytes()


@pytest.mark.parametrize("large", [0, LARGE_ROW_BYTES], ids=["one by one", "indexed"])
def test_a_gather_is_what_indexing_the_written_rows_gives(recorded_here, monkeypatch, large):
    monkeypatch.setattr(shard_reader, "LARGE_ROW_BYTES", large)
    cache, expected = recorded_here
    names = tuple(array.name for array in cache.arrays)

    @given(positions=st.lists(st.integers(0, 99), max_size=80), seed=st.integers(0, 1))
    def check(positions, seed):
        where = np.array(positions, np.int64)
        wanted = {name: values[where] for name, values in expected.rows[seed].items()}
        assert_same(cache.gather(seed, where), wanted, names)

    check()


def test_a_range_is_a_slice_of_the_written_rows(recorded_here):
    cache, expected = recorded_here

    @given(edges=st.tuples(st.integers(0, 99), st.integers(1, 100)), names=NAMES)
    def check(edges, names):
        start, stop = min(edges), max(edges)
        if start == stop:
            start -= 1
        wanted = {name: expected.rows[0][name][start:stop] for name in names}
        assert_same(cache.read(0, start, stop, arrays=tuple(names)), wanted, names)

    check()


def test_a_range_is_ready_once_its_chunks_were_read(write_once):
    cache = open_cache(write_once("dense", "local"))
    assert not cache.is_ready(0, 0, 8)
    cache.read(0, 0, 8)
    assert cache.is_ready(0, 0, 8)
    assert cache.is_ready(0, 2, 7, ("sample",))
    assert not cache.is_ready(0, 4, 12)
    assert not cache.is_ready(1, 0, 8)
    cache.prefetch(0, 8, ("sample",), 1 << 20)
    assert cache.is_ready(0, 4, 32, ("sample",))
    assert not cache.is_ready(0, 4, 32)
    cache.read(0, 0, 100)
    assert cache.is_ready(0, 20, 100)


@pytest.mark.parametrize("edges", [(-1, 4), (4, 4), (9, 4), (0, 101), (1 << 40, 1 << 41)])
def test_a_range_outside_of_the_epoch_is_never_ready_and_never_raises(write_once, edges):
    cache = open_cache(write_once("dense", "local"))
    cache.read(0, 0, 100)
    assert not cache.is_ready(0, *edges)


def test_a_lookup_is_ready_once_the_order_and_its_chunks_were_read(write_once):
    cache = open_cache(write_once("dense", "local"), open_shards=8)
    samples = np.array([3, 99, 40])
    assert not cache.is_lookup_ready(0, samples)
    cache.read(0, 0, 100)
    assert not cache.is_lookup_ready(0, samples), "the order of the seed is not known yet"
    wanted = cache.lookup(0, samples)
    assert cache.is_lookup_ready(0, samples)
    assert cache.is_lookup_ready(0, samples, ("logits", "digest"))
    assert not cache.is_lookup_ready(1, samples)
    assert not cache.is_lookup_ready(0, np.array([3, 100]))
    assert not cache.is_lookup_ready(0, np.array([-1]))
    assert cache.lookup(0, samples)["logits"].tobytes() == wanted["logits"].tobytes()


def test_small_shards_stay_open_for_rows_in_random_order(tmp_path):
    spec = make_spec(num_samples=20 * 32, shard_rows=32)
    write_cache(str(tmp_path), spec)
    cache = open_cache(str(tmp_path))
    positions = np.arange(spec.dataset.num_samples)[::-1]
    cache.gather(0, positions)
    assert cache.is_ready(0, 0, spec.dataset.num_samples)


def test_a_lookup_with_one_chunk_unread_is_not_ready(write_once):
    cache = open_cache(write_once("dense", "local"), open_shards=8)
    cache.lookup(0, np.array([3]), arrays=("digest",))  # reads the order, which is in `sample`
    assert cache.is_lookup_ready(0, np.array([3]), ("digest",))
    assert not cache.is_lookup_ready(0, np.arange(100), ("digest",))
    assert cache.is_lookup_ready(0, np.arange(100), ("sample",))


@pytest.mark.parametrize("codec", ["dense-zstd", "topk"])
def test_what_must_be_unpacked_is_never_ready(write_once, codec):
    cache = open_cache(write_once(codec, "local"))
    cache.lookup(0, np.arange(100))
    assert not cache.is_ready(0, 0, 8)
    assert not cache.is_lookup_ready(0, np.array([3]))


def test_pieces_are_the_rows_and_whole_mapped_chunks_have_their_checksum(recorded_here):
    cache, expected = recorded_here
    for start, stop in ((0, 100), (3, 5), (3, 50), (8, 16), (99, 100)):
        for array in cache.arrays:
            pieces = cache.pieces(0, start, stop, array.name)
            wanted = expected.rows[0][array.name][start:stop].tobytes()
            assert b"".join(content for content, _ in pieces) == wanted
            for content, known in pieces:
                assert known in (None, crc32c(content))
            if type(cache.storage) is LocalStorage and cache.spec.codec.compression == "none":
                assert (pieces[0][1] is not None) == (start % 8 == 0 and stop - start >= 8)


def test_threads_may_share_a_cache(recorded_here):
    cache, expected = recorded_here
    failures = []

    def work(number):
        rng = np.random.default_rng(number)
        for _ in range(40):
            where = rng.integers(0, 100, 20)
            rows = cache.gather(number % 2, where, arrays=("sample", "digest"))
            if rows["digest"].tolist() != expected.rows[number % 2]["digest"][where].tolist():
                failures.append(where)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("checked", ["all", "one shard", "none"])
def test_rows_of_many_shards_are_the_same_whatever_is_checked_already(write_once, checked):
    url = write_once("dense", "local")
    plain, cache = open_cache(url), open_cache(url, open_shards=8)
    names = tuple(array.name for array in cache.arrays)
    size = cache.spec.layout.shard_rows
    assert cache.spec.num_shards > 2
    wanted = plain.read(0, 0, 100)
    if checked != "none":
        cache.read(0, 0, size if checked == "one shard" else 100)

    @given(positions=st.lists(st.integers(0, 99), min_size=1, max_size=80))
    def check(positions):
        where = np.array(positions, np.int64)
        found = cache.gather(0, where)
        assert_same(found, {name: values[where] for name, values in wanted.items()}, names)

    check()


@pytest.mark.parametrize("how", ["read", "gather", "lookup"])
def test_no_more_shards_stay_open_than_asked_for_and_those_used_last(write_once, how):
    cache = open_cache(write_once("dense", "local"), open_shards=2)
    size = cache.spec.layout.shard_rows
    firsts = [cache.spec.shard_range(shard)[0] for shard in range(cache.spec.num_shards)]
    for first in firsts[:2] + firsts[:1] + firsts[2:3]:
        cache.read(0, first, first + 1)
    ready = [shard for shard, first in enumerate(firsts) if cache.is_ready(0, first, first + 1)]
    assert ready == [0, 2]
    where = np.arange(2 * size)
    wanted = open_cache(cache.url).gather(0, where)
    if how == "read":
        found = cache.read(0, 0, 2 * size)
    elif how == "gather":
        found = cache.gather(0, where)
    else:
        found = cache.lookup(0, wanted["sample"].astype(np.int64))
    assert_same(found, wanted, cache.layout.names)
