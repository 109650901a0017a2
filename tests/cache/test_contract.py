"""Rows come back as they were recorded, for every codec and every storage, or not at all."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.caches import make_rows, make_spec, open_writer, write_cache, write_shard
from support.everything import read_all, same_rows

from cache_service.errors import (
    ConfigError,
    NotACacheError,
    RowsNotBuiltError,
    SpecMismatchError,
)
from cache_service.format.layout import CacheLayout
from cache_service.rows.reader import open_cache

POSITIONS = st.lists(st.integers(0, 99), max_size=40)
same_cache = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_everything_that_was_recorded_comes_back(recorded):
    cache, expected = recorded
    assert read_all(cache, expected) == "whole"


def test_ranges_and_scattered_rows_come_back_in_the_order_asked_for(recorded):
    cache, expected = recorded
    rows = expected.rows[1]
    for start, stop in ((0, 1), (7, 9), (30, 70), (95, 100), (99, 100)):
        assert same_rows(cache.read(1, start, stop), rows, slice(start, stop))
    positions = np.array([99, 0, 31, 32, 31, 99, 64])
    assert same_rows(cache.gather(1, positions), rows, positions)
    assert same_rows(cache.lookup(1, rows["sample"][positions].astype(np.int64)), rows, positions)


@same_cache
@given(st.integers(0, 1), st.integers(0, 99), st.integers(1, 100))
def test_any_range_equals_the_plain_slice_mapped_or_fetched(recorded_here, seed, start, length):
    cache, expected = recorded_here
    stop = min(start + length, 100)
    assert same_rows(cache.read(seed, start, stop), expected.rows[seed], slice(start, stop))


@same_cache
@given(st.integers(0, 1), POSITIONS)
def test_any_positions_equal_the_plain_gather_mapped_or_fetched(recorded_here, seed, positions):
    cache, expected = recorded_here
    found = cache.gather(seed, np.array(positions, np.int64))
    assert same_rows(found, expected.rows[seed], np.array(positions, np.int64))


@same_cache
@given(st.integers(0, 1), POSITIONS)
def test_any_samples_equal_the_plain_search_mapped_or_fetched(recorded_here, seed, samples):
    cache, expected = recorded_here
    order = expected.rows[seed]["sample"].tolist()
    positions = np.array([order.index(sample) for sample in samples], np.int64)
    found = cache.lookup(seed, np.array(samples, np.int64))
    assert same_rows(found, expected.rows[seed], positions)


def test_no_rows_asked_for_are_no_rows_of_the_right_kind(recorded_here):
    cache, expected = recorded_here
    for found in (cache.gather(0, np.zeros(0, np.int64)), cache.lookup(0, np.zeros(0, np.int64))):
        for array in CacheLayout(expected.spec).arrays:
            assert found[array.name].shape == (0, *array.row_shape)
            assert found[array.name].dtype == array.dtype


def test_only_the_arrays_asked_for_are_read(recorded_here):
    cache, _ = recorded_here
    one = np.zeros(1, np.int64)
    assert cache.read(0, 0, 3, arrays=("sample",)).keys() == {"sample"}
    assert cache.gather(0, one, arrays=("origin", "digest")).keys() == {"origin", "digest"}
    assert cache.lookup(0, one, arrays=("sample",)).keys() == {"sample"}


def test_rows_belong_to_the_reader_who_asked(recorded_here):
    cache, _ = recorded_here
    for ask in (lambda: cache.read(0, 2, 4), lambda: cache.gather(0, np.array([2, 3]))):
        first = {name: values.copy() for name, values in ask().items()}
        for values in ask().values():
            values[...] = 0
        assert same_rows(ask(), first, slice(None))


def test_decoded_rows_are_what_the_codec_makes_of_the_answers(recorded_here):
    cache, expected = recorded_here
    rows = cache.read(1, 30, 70)
    logits = expected.spec.decode(rows, temperature=4.0, head=cache.head())
    wanted = {name: values[30:70] for name, values in expected.rows[1].items()}
    np.testing.assert_array_equal(
        logits, expected.spec.decode(wanted, temperature=4.0, head=expected.head)
    )
    classes = expected.spec.teacher.num_classes
    assert logits.shape == (40, expected.spec.num_stored_cells, classes)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (98, 101), (5, 5), (6, 5), (100, 101)])
def test_positions_beyond_the_epoch_are_refused(recorded, start, stop):
    cache, _ = recorded
    says = rf"positions \[{start}, {stop}\) of seed 0 were requested; .* holds positions \[0, 100"
    with pytest.raises(RowsNotBuiltError, match=says):
        cache.read(0, start, stop)


@pytest.mark.parametrize("bad", [-1, 100, 2**40])
def test_one_position_or_sample_too_far_refuses_the_whole_request(recorded, bad):
    cache, _ = recorded
    asked = np.array([3, bad, 5], np.int64)
    with pytest.raises(RowsNotBuiltError, match=f"position {bad} was requested"):
        cache.gather(0, asked)
    with pytest.raises(RowsNotBuiltError, match=f"sample {bad} was requested"):
        cache.lookup(0, asked)


@pytest.mark.parametrize("seed", [-1, 2, 10**6])
def test_a_seed_that_was_not_recorded_is_refused_with_those_that_were(recorded, seed):
    cache, _ = recorded
    one = np.zeros(1, np.int64)
    for ask in (
        lambda: cache.read(seed, 0, 1),
        lambda: cache.gather(seed, one),
        lambda: cache.lookup(seed, one),
        lambda: cache.witnesses(seed, 0),
    ):
        with pytest.raises(RowsNotBuiltError, match="complete seeds there: 0:2") as refusal:
            ask()
        assert f"--seeds {seed}:{seed + 1}" in refusal.value.hint


def test_a_pickled_cache_reads_the_same(recorded_here):
    cache, expected = recorded_here
    cache.read(0, 0, 100)
    assert read_all(pickle.loads(pickle.dumps(cache)), expected) == "whole"


def test_a_cache_with_one_shard_open_at_a_time_reads_the_same(recorded_here):
    cache, expected = recorded_here
    positions = np.random.default_rng(0).integers(0, 100, 64)
    narrow = open_cache(cache.url, open_shards=1)
    assert same_rows(narrow.gather(0, positions), expected.rows[0], positions)
    assert read_all(narrow, expected) == "whole"


# --- half-built caches -----------------------------------------------------------------------


@pytest.fixture
def half_built(tmp_path):
    """Seed 0 lacks its second shard (positions 32 to 63); seed 1 has its first only."""
    spec = make_spec()
    writer = open_writer(str(tmp_path), spec, 2)
    for seed, shard in ((0, 0), (0, 2), (0, 3), (1, 0)):
        write_shard(writer, seed, shard)
    return open_cache(str(tmp_path)), make_rows(spec, 0)


def test_what_is_recorded_can_be_read_before_the_rest_is(half_built):
    cache, rows = half_built
    assert cache.commits() == {0: [0, 2, 3], 1: [0]}
    assert cache.complete_seeds() == []
    assert same_rows(cache.read(0, 64, 100), rows, slice(64, 100))
    present = rows["sample"][[3, 99, 70]].astype(np.int64)
    assert same_rows(cache.lookup(0, present), rows, [3, 99, 70])


def test_an_unbuilt_row_is_refused_never_filled_in(half_built):
    cache, rows = half_built
    says = r"positions \[32, 64\) of seed 0 are not recorded .* complete seeds there: none"
    for ask in (
        lambda: cache.read(0, 0, 100),
        lambda: cache.read(0, 40, 41),
        lambda: cache.gather(0, np.array([0, 33, 99])),
    ):
        with pytest.raises(RowsNotBuiltError, match=says) as refusal:
            ask()
        assert refusal.value.exit_code == 4
    missing = int(rows["sample"][40])
    with pytest.raises(RowsNotBuiltError, match=f"sample {missing} of seed 0 is not recorded yet"):
        cache.lookup(0, np.array([int(rows["sample"][0]), missing]))


def test_a_shard_that_is_recorded_later_is_seen_by_who_has_the_cache_open(half_built):
    cache, rows = half_built
    with pytest.raises(RowsNotBuiltError, match=r"positions \[32, 64\) of seed 0 are not recorded"):
        cache.read(0, 0, 100)
    write_shard(open_writer(cache.url, cache.spec, 2), 0, 1)
    assert cache.complete_seeds() == [0]
    assert same_rows(cache.read(0, 0, 100), rows, slice(None))
    assert same_rows(cache.lookup(0, rows["sample"].astype(np.int64)), rows, slice(None))


def test_keys_that_only_look_like_commits_do_not_complete_a_seed(half_built):
    cache, _ = half_built
    for key in ("0/4.json", "0/01.json", "00/1.json", "0/\u0661.json", "0/-1.json", "0/1.json.bak"):
        cache.storage.put(f"commits/{key}", b"{}")
    assert cache.commits() == {0: [0, 2, 3], 1: [0]}
    assert cache.complete_seeds() == []


def test_data_without_a_commit_is_not_a_shard(tmp_path):
    spec = make_spec()
    write_cache(str(tmp_path), spec)
    (tmp_path / "commits/0/1.json").unlink()
    with pytest.raises(RowsNotBuiltError, match="not recorded"):
        open_cache(str(tmp_path)).read(0, 0, 100)


# --- opening ---------------------------------------------------------------------------------


def test_where_there_is_no_cache_it_says_how_to_make_one(tmp_path):
    with pytest.raises(NotACacheError, match="no cache at") as refusal:
        open_cache(str(tmp_path / "nothing"))
    assert "kd-cache build" in refusal.value.hint


def test_a_cache_of_another_identity_is_refused_on_opening(recorded):
    cache, _ = recorded
    assert open_cache(cache.url, fingerprint=cache.fingerprint).spec == cache.spec
    with pytest.raises(SpecMismatchError, match=f"has fingerprint {cache.fingerprint}, but 00"):
        open_cache(cache.url, fingerprint="0" * 64)


def test_a_url_of_no_storage_is_refused():
    with pytest.raises(ConfigError, match="is unknown"):
        open_cache("ftp://host/cache")
