"""Rows out of the map by every way there is, against the rows that were written."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import support.repeatable  # noqa: F401  loads the profile of the property tests
from hypothesis import given
from hypothesis import strategies as st

from cache_service.format.canonical import crc32c
from cache_service.reader import open_cache
from cache_service.reader_memory import NotAtHandError, blank_rows, typed_rows
from cache_service.storage.local import LocalStorage

NAMES = st.lists(st.sampled_from(["sample", "digest", "origin"]), unique=True, min_size=1)


def assert_same(found, wanted, names):
    assert list(found) == list(names)
    for name in names:
        assert found[name].dtype == wanted[name].dtype
        assert found[name].shape == wanted[name].shape
        assert found[name].tobytes() == wanted[name].tobytes()


def test_a_gather_is_what_indexing_the_written_rows_gives(recorded_here):
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


def test_what_is_not_checked_yet_is_not_at_hand(write_once):
    cache = open_cache(write_once("dense", "local"))
    out = blank_rows(cache.arrays, 8, None)
    with pytest.raises(NotAtHandError):
        cache.read_into(0, 0, 8, out, at_hand=True)
    cache.read_into(0, 0, 8, out)
    again = blank_rows(cache.arrays, 8, None)
    cache.read_into(0, 0, 8, again, at_hand=True)
    assert_same(typed_rows(cache.arrays, again), typed_rows(cache.arrays, out), list(out))
    with pytest.raises(NotAtHandError):
        cache.read_into(0, 4, 12, out, at_hand=True)
    cache.check_ahead(0, 8, tuple(out), 1 << 20)
    cache.read_into(0, 8, 16, out, at_hand=True)
    names = tuple(out)
    backwards = cache.gather_rows(0, np.arange(7, -1, -1), names, at_hand=True)
    assert backwards["sample"].tolist() == again["sample"][::-1].tolist()
    with pytest.raises(NotAtHandError):
        cache.gather_rows(0, np.array([0, 40, 1, 2, 3, 4, 5, 6]), names, at_hand=True)
    with pytest.raises(NotAtHandError):
        cache.locate(0, np.array([1]), at_hand=True)


def test_what_is_fetched_is_never_at_hand(write_once):
    cache = open_cache(write_once("dense-zstd", "local"))
    out = blank_rows(cache.arrays, 8, ("logits",))
    cache.read_into(0, 0, 8, out)
    with pytest.raises(NotAtHandError):
        cache.read_into(0, 0, 8, out, at_hand=True)


def test_a_range_is_ready_once_its_chunks_were_read(write_once):
    cache = open_cache(write_once("dense", "local"))
    assert not cache.is_ready(0, 0, 8)
    cache.read(0, 0, 8)
    assert cache.is_ready(0, 0, 8)
    assert cache.is_ready(0, 2, 7, ("sample",))
    assert not cache.is_ready(0, 4, 12)
    assert not cache.is_ready(1, 0, 8)
    cache.check_ahead(0, 8, ("sample",), 1 << 20)
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


def seeds_mapped(cache):
    return {key: sorted(mapped.shards) for key, mapped in cache._shards._mapped.items()}


def test_shards_that_are_checked_throughout_are_gathered_from_as_one(write_once):
    cache = open_cache(write_once("dense", "local"), open_shards=8)
    names = tuple(array.name for array in cache.arrays)
    positions = np.array([60, 0, 50, 51])
    cache.gather(0, positions)
    assert seeds_mapped(cache) == {}  # of each shard a chunk is checked, and no more
    wanted = {name: values[positions] for name, values in cache.read(0, 0, 100).items()}
    assert_same(cache.gather(0, positions), wanted, names)
    met = sorted({each // cache.spec.layout.shard_rows for each in positions.tolist()})
    assert seeds_mapped(cache) == {(0, names): met}
    assert_same(cache.gather(0, positions), wanted, names)
    everything = np.arange(100)
    assert_same(cache.gather(0, everything), cache.read(0, 0, 100), names)
    assert seeds_mapped(cache) == {(0, names): list(range(cache.spec.num_shards))}


def test_a_seed_looked_at_as_one_array_keeps_no_closed_shard_mapped(write_once):
    cache = open_cache(write_once("dense", "local"), open_shards=2)
    size = cache.spec.layout.shard_rows
    cache.read(0, 0, 2 * size)
    first = np.arange(2 * size)
    wanted = cache.gather(0, first, arrays=("sample",))["sample"]
    assert seeds_mapped(cache) == {(0, ("sample",)): [0, 1]}
    cache.read(1, 0, 1)
    assert seeds_mapped(cache) == {}
    assert np.array_equal(cache.gather(0, first, arrays=("sample",))["sample"], wanted)


def test_shards_gathered_from_as_one_are_not_the_ones_that_are_closed_first(write_once):
    cache = open_cache(write_once("dense", "local"), open_shards=2)
    size = cache.spec.layout.shard_rows
    first = np.arange(size)
    cache.read(0, 0, size)
    cache.gather(0, first)
    cache.read(1, 0, 1)
    cache.gather(0, first)  # read through the seed: the other shard is the older one
    cache.read(1, size, size + 1)
    assert sorted(cache._shards._shards) == [(0, 0), (1, 1)]


def test_a_chunk_that_a_seed_has_not_is_an_error_and_no_memory(write_once):
    cache = open_cache(write_once("dense", "local"), open_shards=8)
    cache.read(0, 0, 100)
    cache.gather(0, np.arange(100), arrays=("sample",))
    mapped = cache._shards._mapped[0, ("sample",)]
    with pytest.raises(IndexError):
        mapped.gather(np.array([1 << 30]), np.array([0]))
