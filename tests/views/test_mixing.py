"""Mixing: neighbors, one draw per pair, exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.format.recipe import CenterCrop, Cutmix, HorizontalFlip, Mixup
from cache_service.views.draws import ONE
from cache_service.views.mixing import CUTMIX, MIXUP, NOT_MIXED, Mixer, mix, own_weights
from cache_service.views.order import epoch_order
from cache_service.views.replay import Views

BOTH = (CenterCrop(), Mixup(), Cutmix())


@given(own=st.integers(0, 255), partner=st.integers(0, 255), share=st.integers(0, ONE))
def test_a_blend_is_the_exact_fraction_rounded_half_up(own, partner, share):
    exact = Fraction(share * own + (ONE - share) * partner, ONE)
    expected = (exact + Fraction(1, 2)).__floor__()
    pixel = np.full((1, 1, 3), own, dtype=np.uint8)
    other = np.full((1, 1, 3), partner, dtype=np.uint8)
    assert mix(pixel, other, [MIXUP, share, 0, 0, 0, 0]).tolist() == [[[expected] * 3]]


def test_the_blend_rounds_a_half_upward_in_both_members():
    black, gray = np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 1, np.uint8)
    half = [MIXUP, ONE // 2, 0, 0, 0, 0]
    assert mix(black, gray, half).max() == mix(gray, black, half).max() == 1


def test_a_mixed_view_equals_its_definition_in_floating_point(synthetic, make_recipe):
    dataset = synthetic()
    plain = Views(make_recipe(CenterCrop()), dataset).render(4, range(40))
    mixed = Views(make_recipe(CenterCrop(), Mixup(alpha=1.0)), dataset).render(4, range(40))
    own = plain.pixels_BHW3.astype(np.float64)
    partner = own[np.arange(40) ^ 1]
    share = mixed.weights_B.astype(np.float64)[:, None, None, None]
    expected = np.floor(share * own + (1 - share) * partner + 0.5)
    np.testing.assert_array_equal(mixed.pixels_BHW3, expected)


def test_partners_are_neighbors_and_share_one_draw(synthetic, make_recipe):
    order = epoch_order(40, 2)
    batch = Views(make_recipe(*BOTH), synthetic()).render(2, range(40))
    np.testing.assert_array_equal(batch.samples_B, order)
    np.testing.assert_array_equal(batch.partners_B, order[np.arange(40) ^ 1])
    np.testing.assert_array_equal(batch.weights_B[0::2], batch.weights_B[1::2])


def test_the_odd_last_position_is_unmixed(synthetic, make_recipe):
    dataset = synthetic(num_samples=7)
    batch = Views(make_recipe(*BOTH), dataset).render(0, range(7))
    plain = Views(make_recipe(CenterCrop()), dataset).render(0, range(7))
    assert batch.partners_B[6] == batch.samples_B[6]
    assert batch.weights_B[6] == 1.0
    np.testing.assert_array_equal(batch.pixels_BHW3[6], plain.pixels_BHW3[6])
    assert (batch.partners_B[:6] != batch.samples_B[:6]).all()


def test_cutmix_pastes_one_box_from_the_partner_and_weighs_what_is_left(synthetic, make_recipe):
    dataset = synthetic(sizes=((32, 32),))
    plain = Views(make_recipe(CenterCrop()), dataset).render(3, range(40)).pixels_BHW3
    batch = Views(make_recipe(CenterCrop(), Cutmix()), dataset).render(3, range(40))
    pairs = Mixer(make_recipe(CenterCrop(), Cutmix())).draw(3, epoch_order(40, 3)[::2])
    for position, pixels in enumerate(batch.pixels_BHW3):
        _, _, top, left, bottom, right = pairs[position // 2]
        expected = plain[position].copy()
        expected[top:bottom, left:right] = plain[position ^ 1][top:bottom, left:right]
        np.testing.assert_array_equal(pixels, expected)
        kept = 1 - Fraction(int((bottom - top) * (right - left)), 32 * 32)
        assert batch.weights_B[position] == np.float32(kept)


def test_with_both_ops_half_of_the_pairs_get_each(make_recipe):
    pairs = Mixer(make_recipe(*BOTH)).draw(0, np.arange(20_000))
    assert abs((pairs[:, 0] == MIXUP).mean() - 0.5) < 0.015
    assert abs((pairs[:, 0] == CUTMIX).mean() - 0.5) < 0.015


def test_each_op_happens_as_often_as_its_prob(make_recipe):
    recipe = make_recipe(CenterCrop(), Mixup(prob=0.2), Cutmix(prob=0.6))
    pairs = Mixer(recipe).draw(0, np.arange(20_000))
    assert abs((pairs[:, 0] == MIXUP).mean() - 0.1) < 0.01
    assert abs((pairs[:, 0] == CUTMIX).mean() - 0.3) < 0.015
    assert (pairs[pairs[:, 0] == NOT_MIXED] == 0).all()


def test_adding_cutmix_keeps_the_shares_of_mixup(make_recipe):
    samples = np.arange(500)
    alone = Mixer(make_recipe(CenterCrop(), Mixup())).draw(0, samples)
    both = Mixer(make_recipe(*BOTH)).draw(0, samples)
    kept = both[:, 0] == MIXUP
    np.testing.assert_array_equal(alone[kept], both[kept])


def test_an_op_before_mixing_changes_which_words_mixing_reads(make_recipe):
    samples = np.arange(50)
    second = Mixer(make_recipe(CenterCrop(), Mixup())).draw(0, samples)
    third = Mixer(make_recipe(CenterCrop(), HorizontalFlip(), Mixup())).draw(0, samples)
    assert (second != third).any()


@pytest.mark.parametrize("size", [8, 33, 224])
def test_boxes_lie_inside_and_match_the_share_where_nothing_is_cut_off(make_recipe, size):
    pairs = Mixer(make_recipe(CenterCrop(), Cutmix(), size=size)).draw(0, np.arange(3000))
    top, left, bottom, right = pairs[:, 2:].T
    assert (pairs[:, 2:] >= 0).all()
    assert (pairs[:, 2:] <= size).all()
    half = np.array([int(0.5 * (1 - s / ONE) ** 0.5 * size) for s in pairs[:, 1]])
    whole = (top > 0) & (left > 0) & (bottom < size) & (right < size)
    np.testing.assert_array_equal((bottom - top)[whole], 2 * half[whole])
    np.testing.assert_array_equal((right - left)[whole], 2 * half[whole])
    assert ((bottom - top) <= 2 * half).all()


def test_a_share_is_exact_in_float32():
    for share in (0, 1, 12345, ONE - 1, ONE):
        weights_B = own_weights(np.array([[MIXUP, share, 0, 0, 0, 0]]), 32)
        assert weights_B.dtype == np.float32
        assert weights_B[0] == Fraction(share, ONE)
    pairs_BP = np.array([[CUTMIX, 7, 0, 0, 16, 16], [NOT_MIXED, 7, 0, 0, 0, 0]])
    assert own_weights(pairs_BP, 32).tolist() == [0.75, 1.0]
