"""Rows out of the map by every way there is, against the rows that were written."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import support.repeatable  # noqa: F401  loads the profile of the property tests
from hypothesis import given
from hypothesis import strategies as st

from cache_service.reader import open_cache
from cache_service.reader_memory import NotAtHandError, blank_rows, gather_mapped, typed_rows
from cache_service.reader_shard import gather_across

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
    plain, cache = open_cache(url), open_cache(url)
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


def test_rows_of_checked_shards_come_by_one_index_and_of_others_do_not(write_once):
    cache = open_cache(write_once("dense", "local"))
    positions = np.array([99, 0, 50, 51])
    shards, local = np.divmod(positions, cache.spec.layout.shard_rows)
    numbers = sorted(set(shards.tolist()))
    places = np.divmod(local, cache.spec.layout.chunk_rows)
    opened = [cache._shard(0, number) for number in numbers]
    which = np.searchsorted(numbers, shards)
    names = tuple(array.name for array in cache.arrays)
    assert gather_across(opened, which, places, names) is None
    wanted = {name: values[positions] for name, values in cache.read(0, 0, 100).items()}
    found = gather_across(opened, which, places, names)
    assert_same(typed_rows(cache.arrays, found), wanted, names)


def test_a_place_beyond_the_maps_is_an_error_and_no_memory(write_once):
    cache = open_cache(write_once("dense", "local"))
    cache.read(0, 0, 100)
    (maps,) = zip(*[cache._shard(0, n).checked_maps(["sample"]) for n in range(2)], strict=True)
    beyond = np.array([1 << 30])
    with pytest.raises(IndexError):
        gather_mapped(maps, np.array([0]), beyond, beyond)
