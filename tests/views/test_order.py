"""A seed's order is a permutation that only the seed and the dataset's size decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.views import order as orders
from cache_service.views.order import (
    BLOCK_ROWS,
    ORDER_KEY,
    WINDOW_VIEWS,
    epoch_order,
    pass_order,
    positions_of,
    visits,
)


@given(num_samples=st.integers(1, 300), seed=st.integers(0, 2**64 - 1))
def test_every_sample_is_visited_exactly_once(num_samples, seed):
    order = epoch_order(num_samples, seed)
    assert order.dtype == np.int32
    assert sorted(order.tolist()) == list(range(num_samples))


@given(num_samples=st.integers(1, 300), seed=st.integers(0, 1000))
def test_positions_are_the_inverse(num_samples, seed):
    order = epoch_order(num_samples, seed)
    positions = positions_of(order)
    np.testing.assert_array_equal(positions[order], np.arange(num_samples))
    np.testing.assert_array_equal(order[positions], np.arange(num_samples))


def test_the_order_sorts_the_samples_by_their_words():
    words = np.random.Philox(key=ORDER_KEY | 3 << 64).random_raw(101).tolist()
    assert epoch_order(101, 3).tolist() == sorted(range(101), key=words.__getitem__)


def test_the_order_is_pinned():
    assert epoch_order(50_000, 0)[:6].tolist() == [33196, 4979, 49917, 4276, 36362, 25968]
    assert epoch_order(50_000, 1)[:6].tolist() == [8718, 13795, 16436, 915, 23951, 24048]


def test_neighbors_are_paired_with_no_regard_to_their_numbers(assert_uniform):
    order = epoch_order(20_000, 0).astype(np.int64)
    gaps = (order[1::2] - order[0::2]) % 20_000
    assert_uniform(gaps * 20 // 20_000, 20)


def forget():
    for function in (orders._plain_order, orders._fixed_order, visits, pass_order):
        function.cache_clear()


def test_orders_that_processes_share_are_those_of_one_process(monkeypatch):
    def arrays():
        forget()
        found = [epoch_order(1000, 3), *visits(1000, 3, 3), pass_order(1000, 3, 1, 2)]
        return [*found, pass_order(1000, 3, 3, 2), orders._fixed_order(1000)]

    alone = arrays()
    monkeypatch.setattr(orders, "SHARED_SAMPLES", 1000)
    for mine, shared in zip(alone, arrays(), strict=True):
        np.testing.assert_array_equal(shared, mine, strict=True)
        assert isinstance(shared.base, np.memmap)
    for mine, again in zip(alone, arrays(), strict=True):
        np.testing.assert_array_equal(again, mine, strict=True)
    forget()


@pytest.mark.parametrize("shared_from", [1, 1000])
def test_an_order_cannot_be_changed_by_who_holds_it(monkeypatch, shared_from):
    forget()
    monkeypatch.setattr(orders, "SHARED_SAMPLES", shared_from)
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(10, 0)[0] = 1
    forget()


REPEATS = st.integers(2, 64)


def visited(num_samples, seed, repeats):
    """(sample, seed of its draws) at each position."""
    found = visits(num_samples, seed, repeats)
    return list(zip(found.samples_N.tolist(), found.draw_seeds_N.tolist(), strict=True))


@given(num_samples=st.integers(1, 300), repeats=REPEATS, first=st.integers(0, 1000))
def test_any_k_consecutive_seeds_visit_every_sample_k_times(num_samples, repeats, first):
    counts = np.zeros(num_samples, int)
    for seed in range(first, first + repeats):
        samples = epoch_order(num_samples, seed, repeats)
        assert (samples.dtype, len(samples)) == (np.int32, num_samples)
        counts += np.bincount(samples, minlength=num_samples)
    assert (counts == repeats).all()


@given(num_samples=st.integers(1, 200), repeats=REPEATS, cycle=st.integers(0, 50))
def test_k_seeds_have_the_very_views_of_k_seeds_without_repeats(num_samples, repeats, cycle):
    seeds = range(cycle * repeats, (cycle + 1) * repeats)
    found = [view for seed in seeds for view in visited(num_samples, seed, repeats)]
    assert sorted(found) == [(sample, seed) for sample in range(num_samples) for seed in seeds]


@given(num_samples=st.integers(2, 300), repeats=REPEATS, seed=st.integers(0, 200))
def test_of_each_visited_sample_all_views_are_in_the_seed_but_of_two_at_its_edges(
    num_samples, repeats, seed
):
    _, counts = np.unique(epoch_order(num_samples, seed, repeats), return_counts=True)
    assert (counts < repeats).sum() <= (0 if num_samples % repeats == 0 else 2)


@given(num_samples=st.integers(2, 300), repeats=REPEATS, seed=st.integers(0, 200))
def test_mixing_partners_are_different_samples(num_samples, repeats, seed):
    samples = epoch_order(num_samples, seed, repeats)[: num_samples // 2 * 2]
    _, counts = np.unique(samples, return_counts=True)
    # One sample cannot be everybody's partner but its own.
    if (counts == repeats).sum() >= 2:
        assert (samples[0::2] != samples[1::2]).all()


@pytest.mark.parametrize("repeats", [2, 3, 4, 5, 8, 16, 32])
def test_all_views_of_an_image_are_within_one_window(repeats):
    found = visits(1000, 3, repeats)
    paired = found.samples_N[: 2 * found.first_RU.size]
    size = WINDOW_VIEWS // (2 * repeats) * 2 * repeats
    windows = np.arange(len(paired)) // size
    assert all(len(set(windows[paired == sample])) == 1 for sample in set(paired.tolist()))
    assert size > WINDOW_VIEWS - 2 * repeats
    assert len(found.samples_N) - len(paired) <= 5 * repeats


def test_the_samples_of_a_seed_with_repeats_are_no_range_of_numbers(assert_uniform):
    samples = np.unique(epoch_order(20_000, 1, 4)).astype(np.int64)
    assert len(samples) == 5000
    assert_uniform(samples * 20 // 20_000, 20)


def test_the_order_with_repeats_is_pinned():
    assert visited(50_000, 6, 4)[:4] == [(49857, 4), (31944, 4), (36127, 4), (6419, 4)]
    assert visited(50_000, 6, 4)[16:20] == [(48601, 5), (22911, 5), (17108, 5), (12110, 5)]


def test_orders_with_repeats_are_read_only():
    for array in visits(50, 0, 4):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


# Later passes over a seed.


@given(
    num_samples=st.integers(1, 3000),
    repeats=st.sampled_from([1, 1, 2, 3, 4, 64]),
    seed=st.integers(0, 200),
    turn=st.integers(0, 9),
)
def test_every_pass_reads_each_position_once_and_keeps_pairs(num_samples, repeats, seed, turn):
    order = pass_order(num_samples, seed, repeats, turn)
    assert np.sort(order).tolist() == list(range(num_samples))
    pairs = order[: num_samples // 2 * 2].reshape(-1, 2)
    assert (pairs[:, 0] % 2 == 0).all()
    assert (pairs[:, 1] == pairs[:, 0] + 1).all()


def test_the_first_pass_reads_as_recorded():
    assert pass_order(7, 5, 1, 0).tolist() == list(range(7))
    assert pass_order(100, 5, 4, 0).tolist() == list(range(100))


@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("batch", [64, 256, 1024])
def test_batches_of_later_passes_consist_of_other_views(repeats, batch):
    orders = [pass_order(16_384, 0, repeats, turn) // 2 for turn in range(3)]
    batches = [np.split(order, range(batch, len(order), batch)) for order in orders]
    recorded = [set(each.tolist()) for each in batches[0]]
    for again in (batches[1], batches[2]):
        largest = np.array(
            [max(len(set(each.tolist()) & before) for before in recorded) for each in again]
        )
        assert (largest < batch / 2).all()
        # The first and the last block are shorter, so few batches may be mostly one of these.
        assert (largest > 0.8 * batch / 2).sum() <= 2
    assert (orders[1] != orders[2]).mean() > 0.9


@pytest.mark.parametrize("repeats", [1, 4])
def test_a_later_pass_reads_block_by_block(repeats):
    order = pass_order(50_000, 2, repeats, 1)
    jumps = np.abs(np.diff(order)) > BLOCK_ROWS
    # One window may consist of units of two blocks.
    assert jumps.sum() <= (50_000 / BLOCK_ROWS + 2) * (1 if repeats == 1 else WINDOW_VIEWS)
    assert jumps.sum() >= 0.9 * 50_000 / BLOCK_ROWS


def test_views_of_an_image_stay_in_one_window_in_a_later_pass():
    found, order = visits(4096, 1, 4), pass_order(4096, 1, 4, 3)
    windows = np.arange(4096) // WINDOW_VIEWS
    samples = found.samples_N[order]
    assert all(len(set(windows[samples == sample])) == 1 for sample in set(samples.tolist()))


def test_the_order_of_a_later_pass_is_pinned():
    assert pass_order(50_000, 1, 1, 2)[:6].tolist() == [35878, 35879, 36174, 36175, 36172, 36173]
    assert pass_order(50_000, 1, 4, 2)[:4].tolist() == [35076, 35077, 36042, 36043]
