"""Our Philox is NumPy's Philox."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.views.color_ops import NOISE_KEY
from cache_service.views.draws import VIEW_KEY, draw_words, philox_blocks
from cache_service.views.order import ORDER_KEY

word = st.one_of(
    st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**64 - 2, 2**64 - 1])
)


@given(
    key=st.tuples(word, word),
    counters=st.lists(st.integers(0, 2**256 - 1), min_size=1, max_size=5),
)
def test_words_are_bit_identical_to_numpy_for_any_key_and_counter(key, counters):
    places = [[counter >> 64 * place & 2**64 - 1 for counter in counters] for place in range(4)]
    ours = philox_blocks(key, np.array(places, dtype=np.uint64)).T
    for words, counter in zip(ours, counters, strict=True):
        # NumPy steps its counter before each block.
        stream = np.random.Philox(key=key[0] | key[1] << 64, counter=(counter - 1) % 2**256)
        np.testing.assert_array_equal(words, stream.random_raw(4))


def test_the_first_words_are_pinned():
    words = draw_words(7, np.array([3]), [0, 4])[1]
    assert words[0].tolist() == [
        7735007409437423625,
        17656115490795619739,
        8750292531828364799,
        10955098737837901955,
    ]


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_stream_is_numpys_with_the_sample_and_the_stream_in_its_counter(stream):
    drawn = draw_words(2**63 + 5, np.array([11, 2**31 - 1]), [3, 0, 9][: stream + 1])
    for row, sample in zip(drawn[stream], [11, 2**31 - 1], strict=True):
        key, counter = np.array([[VIEW_KEY, 2**63 + 5, 0, 0], [0, sample, stream, 0]], np.uint64)
        expected = np.random.Philox(key=key[:2], counter=counter).random_raw(len(row))
        np.testing.assert_array_equal(row, expected)


def test_a_sample_has_the_same_words_whatever_is_drawn_beside_it():
    alone = draw_words(5, np.array([9]), [30, 1, 6])
    among = draw_words(5, np.arange(20), [30, 1, 6, 33])
    for one, many in zip(alone, among, strict=False):
        np.testing.assert_array_equal(one[0], many[9])


def test_an_op_that_takes_no_words_leaves_the_streams_of_the_others_where_they_are():
    with_words = draw_words(5, np.arange(3), [8, 4])
    without = draw_words(5, np.arange(3), [0, 4])
    assert without[0].shape == (3, 0)
    np.testing.assert_array_equal(with_words[1], without[1])


def test_seeds_samples_and_streams_all_give_other_words():
    words = np.concatenate(
        [w.ravel() for seed in range(3) for w in draw_words(seed, np.arange(50), [5, 9])]
    )
    assert len(np.unique(words)) == len(words)


def test_no_two_uses_share_a_key():
    assert len({VIEW_KEY, ORDER_KEY, NOISE_KEY}) == 3
