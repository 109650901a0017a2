"""Flip, color, automatic augmentation and erasing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageChops
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from cache_service.format import recipe
from cache_service.views.auto_augment import (
    _FUNCTIONS,
    NUM_LEVELS,
    OP_NAMES,
    RandAugment,
    TrivialAugment,
    _narrow,
    _wide,
)
from cache_service.views.color_ops import MEAN_COLOR, ColorJitter, RandomErasing
from cache_service.views.draws import ONE
from cache_service.views.geometry_ops import HorizontalFlip, first_fit

TORCHVISION_NAMES = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness"),
    *("Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)


@pytest.fixture
def image(synthetic):
    return synthetic(sizes=((48, 48),)).image(2)


def pixels_of(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
def test_flips_happen_as_often_as_asked(draw, prob):
    op = HorizontalFlip(recipe.HorizontalFlip(prob=prob), 48)
    assert abs(draw(op, 20_000).mean() - prob) < 0.012


def test_a_flip_mirrors_left_and_right(image):
    op = HorizontalFlip(recipe.HorizontalFlip(), 48)
    np.testing.assert_array_equal(op.apply(image, [1]), pixels_of(image)[:, ::-1])
    np.testing.assert_array_equal(op.apply(image, [0]), pixels_of(image))


def test_jitter_factors_fill_their_ranges_and_orders_are_uniform(draw, assert_uniform):
    settings = recipe.ColorJitter(brightness=0.4, contrast=1.0, saturation=0.2, hue=0.1, prob=0.8)
    params = draw(ColorJitter(settings, 48), 20_000)
    assert abs(params[:, 0].mean() - 0.8) < 0.015
    assert_uniform(params[:, 1], 24)
    low, high = params[:, 2:].min(axis=0) / ONE, params[:, 2:].max(axis=0) / ONE
    np.testing.assert_allclose(low, [0.6, 0.0, 0.8, -0.1], atol=2e-3)
    np.testing.assert_allclose(high, [1.4, 2.0, 1.2, 0.1], atol=2e-3)


def test_jitter_applies_the_factors_in_the_drawn_order(image):
    op = ColorJitter(recipe.ColorJitter(brightness=1, contrast=1, saturation=1, hue=0.5), 48)
    last_order = 23  # 3, 2, 1, 0: hue, saturation, contrast, brightness
    half = ONE // 2
    params = [1, last_order, half, 3 * half, half // 2, ONE // 4]
    expected = functional.adjust_hue(image, 0.25)
    expected = functional.adjust_saturation(expected, 0.25)
    expected = functional.adjust_contrast(expected, 1.5)
    expected = functional.adjust_brightness(expected, 0.5)
    np.testing.assert_array_equal(op.apply(image, params), expected)
    assert op.apply(image, [0, *params[1:]]) is image


def test_a_jitter_without_ranges_changes_nothing(image, draw):
    op = ColorJitter(recipe.ColorJitter(), 48)
    assert all(op.apply(image, params) is image for params in draw(op, 20).tolist())


@pytest.mark.parametrize(
    ("reference", "table"),
    [(v2.RandAugment(), _narrow(48)), (v2.TrivialAugmentWide(), _wide())],
    ids=["rand", "trivial"],
)
@pytest.mark.parametrize("op", range(len(OP_NAMES)), ids=OP_NAMES)
def test_each_op_is_torchvisions_at_every_level(image, reference, table, op):
    """torchvision has no public way to apply one of its ops, hence the private call."""
    make_levels, signed = reference._AUGMENTATION_SPACE[TORCHVISION_NAMES[op]]
    levels = make_levels(NUM_LEVELS, 48, 48)
    for level in (0, 9, 14, NUM_LEVELS - 1):
        magnitude = float(levels[level]) if levels is not None else 0.0
        for sign in (1, -1) if signed else (1,):
            expected = reference._apply_image_or_video_transform(
                image, TORCHVISION_NAMES[op], sign * magnitude, v2.InterpolationMode.NEAREST, {}
            )
            ours = _FUNCTIONS[op](image, sign * int(table[op, level]))
            # Magnitudes differ by up to 2**-17, so a color may round the other way; and a shear or
            # rotation may pick the neighboring pixel where the source lies on an edge.
            off = pixels_of(ImageChops.difference(ours, expected)).max(axis=-1) > 1
            assert off.mean() < 0.004


def test_rand_augment_draws_ops_uniformly_and_both_signs(draw, assert_uniform):
    op = RandAugment(recipe.RandAugment(num_ops=3, magnitude=9), 224)
    params = draw(op, 8000)
    assert params.shape == (8000, 6)
    for slot in range(3):
        assert_uniform(params[:, 2 * slot], len(OP_NAMES))
    rotations = params[params[:, 0] == OP_NAMES.index("rotate"), 1]
    assert set(rotations.tolist()) == {9 * ONE, -9 * ONE}
    assert abs((rotations > 0).mean() - 0.5) < 0.12
    posterized = params[params[:, 0] == OP_NAMES.index("posterize"), 1]
    assert set(posterized.tolist()) == {7}


def test_trivial_augment_draws_every_level(draw):
    params = draw(TrivialAugment(recipe.TrivialAugment(), 224), 20_000)
    rotations = params[params[:, 0] == OP_NAMES.index("rotate"), 1] / ONE
    assert set(np.abs(rotations).tolist()) == {4.5 * level for level in range(NUM_LEVELS)}
    shifts = params[params[:, 0] == OP_NAMES.index("translate_x"), 1]
    assert shifts.min() == -32
    assert shifts.max() == 32


@pytest.mark.parametrize("make", [recipe.RandAugment, recipe.TrivialAugment])
def test_exactly_the_ops_with_two_directions_are_signed(draw, make):
    op = {"rand_augment": RandAugment, "trivial_augment": TrivialAugment}[make().op](make(), 224)
    params = draw(op, 4000)[:, :2]
    negative = {OP_NAMES[op] for op, magnitude in params.tolist() if magnitude < 0}
    assert negative == set(OP_NAMES[1:10])


def test_magnitudes_end_where_torchvision_says():
    narrow, wide = _narrow(331)[:, 30], _wide()[:, 30]
    row = {name: i for i, name in enumerate(OP_NAMES)}
    assert narrow[row["translate_x"]] == 150
    assert narrow[row["rotate"]] == 30 * ONE
    assert narrow[row["posterize"]] == 4
    assert narrow[row["solarize"]] == 0
    assert narrow[row["shear_x"]] / ONE == pytest.approx(0.3, abs=1 / 8192)
    assert wide[row["rotate"]] == 135 * ONE
    assert wide[row["posterize"]] == 2
    assert wide[row["brightness"]] / ONE == pytest.approx(0.99, abs=1e-5)


def test_erasing_overwrites_one_box_and_nothing_else(image, draw):
    op = RandomErasing(recipe.RandomErasing(prob=1.0), 48)
    before = image.tobytes()
    shares = []
    for params in draw(op, 300).tolist():
        erased = pixels_of(op.apply(image, params))
        is_mean = (erased == MEAN_COLOR).all(axis=-1)
        rows, columns = np.flatnonzero(is_mean.any(axis=1)), np.flatnonzero(is_mean.any(axis=0))
        box = is_mean[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()
        np.testing.assert_array_equal(erased[~is_mean], pixels_of(image)[~is_mean])
        shares.append(is_mean.mean())
    assert image.tobytes() == before
    assert 0.015 < min(shares) < 0.05
    assert 0.28 < max(shares) < 0.36


def test_erasing_happens_as_often_as_asked(draw):
    op = RandomErasing(recipe.RandomErasing(prob=0.25), 48)
    assert abs(draw(op, 20_000)[:, 0].mean() - 0.25) < 0.015


def test_noise_is_uniform_and_each_sample_has_its_own(draw, assert_uniform):
    settings = recipe.RandomErasing(prob=1, fill="noise", area=(0.9, 0.9), ratio=(1, 1))
    op = RandomErasing(settings, 48)
    blank = Image.new("RGB", (48, 48))
    noises = []
    for params in draw(op, 2).tolist():
        top, left, height, width = first_fit(params[2:], 48, 48, room=1)
        noise = pixels_of(op.apply(blank, params))[top : top + height, left : left + width]
        assert_uniform(noise.ravel(), 256)
        noises.append(noise)
        np.testing.assert_array_equal(op.apply(blank, params), op.apply(blank, params))
    assert (noises[0] != noises[1]).mean() > 0.98


def test_a_box_that_never_fits_erases_nothing(image, draw):
    op = RandomErasing(recipe.RandomErasing(prob=1, area=(1, 1)), 48)
    assert all(op.apply(image, params) is image for params in draw(op, 20).tolist())


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (7, 9)])
@pytest.mark.parametrize(
    "op",
    [
        HorizontalFlip(recipe.HorizontalFlip(prob=1), 8),
        ColorJitter(recipe.ColorJitter(brightness=1, contrast=1, saturation=1, hue=0.5), 8),
        RandAugment(recipe.RandAugment(num_ops=4, magnitude=30), 8),
        TrivialAugment(recipe.TrivialAugment(), 8),
        RandomErasing(recipe.RandomErasing(prob=1, fill="noise"), 8),
    ],
    ids=lambda op: type(op).__name__,
)
def test_ops_keep_the_size_of_odd_and_tiny_images(synthetic, draw, op, size):
    image = synthetic(sizes=(size,)).image(0)
    for params in draw(op, 40).tolist():
        assert op.apply(image, params).size == size
