"""A seed's order is a permutation that only the seed and the dataset's size decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.views.draws import ORDER_KEY, epoch_order, positions_of


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


def test_an_order_cannot_be_changed_by_who_holds_it():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(10, 0)[0] = 1
