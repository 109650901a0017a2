"""Rows out of the map by every way there is, against the rows that were written."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import support.repeatable  # noqa: F401  loads the profile of the property tests
from hypothesis import given
from hypothesis import strategies as st

from cache_service.reader import open_cache
from cache_service.reader_shard import NotAtHandError, blank_rows, typed_rows

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
    cache.gather_into(0, np.arange(7, -1, -1), out, at_hand=True)
    with pytest.raises(NotAtHandError):
        cache.gather_into(0, np.array([0, 40, 1, 2, 3, 4, 5, 6]), out, at_hand=True)
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
