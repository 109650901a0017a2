"""Framing: any image in, a square of the view's size out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode, functional

from cache_service.format import recipe
from cache_service.views import on_pil
from cache_service.views.draws import ONE
from cache_service.views.geometry_ops import Box, CenterCrop, PadCrop, RandomResizedCrop, first_fit

SIZES = [(32, 32), (1, 1), (1, 400), (300, 1), (31, 33), (8, 900), (640, 480), (5, 5)]

FRAMINGS = {
    "pad": PadCrop(recipe.PadCrop(), 32),
    "reflect": PadCrop(recipe.PadCrop(padding=64, mode="reflect"), 32),
    "center": CenterCrop(recipe.CenterCrop(crop_pct=0.875, interpolation="bicubic"), 32),
    "resized": RandomResizedCrop(recipe.RandomResizedCrop(), 32),
    "tall": RandomResizedCrop(recipe.RandomResizedCrop(ratio=(0.01, 0.02)), 32),
    "wide": RandomResizedCrop(recipe.RandomResizedCrop(ratio=(90, 100)), 32),
    "no_area": RandomResizedCrop(recipe.RandomResizedCrop(area=(1e-9, 1e-9)), 32),
}


@pytest.fixture
def image(synthetic):
    return synthetic(sizes=((32, 32),)).image(0)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("padding", [0, 1, 4, 40])
def test_pad_crop_equals_padding_then_cropping(image, draw, mode, padding):
    op = PadCrop(recipe.PadCrop(padding=padding, mode=mode), 32)
    for top, left in draw(op, 20).tolist():
        padded = functional.pad(image, [padding] * 4, padding_mode=mode)
        expected = functional.crop(padded, top, left, 32, 32)
        np.testing.assert_array_equal(op.apply(image, [top, left]), expected)


def test_pad_crop_offsets_are_uniform(draw, assert_uniform):
    params = draw(PadCrop(recipe.PadCrop(padding=4), 32), 20_000)
    assert_uniform(params[:, 0], 9)
    assert_uniform(params[:, 1], 9)
    assert_uniform(params[:, 0] * 9 + params[:, 1], 81)


def test_pad_crop_of_another_size_resizes_the_shorter_side_first(synthetic):
    op = PadCrop(recipe.PadCrop(padding=4), 32)
    image = synthetic(sizes=((100, 60),)).image(0)
    resized = functional.resize(image, [32], interpolation=InterpolationMode.BILINEAR)
    centered = functional.center_crop(resized, [32, 32])
    np.testing.assert_array_equal(op.apply(image, [4, 4]), centered)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", FRAMINGS.values(), ids=FRAMINGS)
def test_any_image_becomes_a_square(synthetic, draw, size, op):
    image = synthetic(sizes=(size,)).image(0)
    before = image.tobytes()
    for params in draw(op, 5).tolist():
        assert op.apply(image, params).size == (32, 32)
    assert image.tobytes() == before


def test_a_very_long_image_is_cut_before_it_is_enlarged(synthetic, monkeypatch):
    """Whole, it would take 4 GB on its way to 224 x 224 px."""
    resized = []
    resize = on_pil.resize
    monkeypatch.setattr(
        on_pil, "resize", lambda *a, **k: resized.append(resize(*a, **k)) or resized[0]
    )
    op = CenterCrop(recipe.CenterCrop(), 224)
    framed = op.apply(synthetic(sizes=((2, 60_000),)).image(0), [])
    assert framed.size == (224, 224)
    assert resized[0].size == (224, 4 * 224)


def test_center_crop_is_resize_then_crop(synthetic):
    image = synthetic(sizes=((500, 375),)).image(0)
    op = CenterCrop(recipe.CenterCrop(crop_pct=0.875), 224)
    expected = functional.center_crop(functional.resize(image, [256]), [224, 224])
    np.testing.assert_array_equal(op.apply(image, []), expected)


def test_resized_crop_areas_and_ratios_stay_in_their_ranges(draw):
    op = RandomResizedCrop(recipe.RandomResizedCrop(), 32)
    boxes = [first_fit(p, 1100, 1100, room=0) for p in draw(op, 4000).tolist()]
    areas = np.array([b.height * b.width / 1100**2 for b in boxes if b])
    ratios = np.array([b.width / b.height for b in boxes if b])
    assert 0.079 < areas.min() < 0.09
    assert 0.93 < areas.max() <= 1.0
    assert 0.745 < ratios.min() < 0.755
    assert 1.325 < ratios.max() < 1.34
    assert abs(np.log(ratios).mean()) < 0.02


def test_resized_crop_places_are_uniform(draw, assert_uniform):
    op = RandomResizedCrop(recipe.RandomResizedCrop(area=(0.25, 0.25), ratio=(1, 1)), 32)
    boxes = [first_fit(p, 16, 16, room=0) for p in draw(op, 5000).tolist()]
    assert {(b.height, b.width) for b in boxes} == {(8, 8)}
    assert_uniform(np.array([b.top for b in boxes]), 9)
    assert_uniform(np.array([b.left for b in boxes]), 9)


@settings(max_examples=300)
@given(
    area=st.integers(1, ONE),
    ratio=st.integers(ONE // 100, 100 * ONE),
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
)
def test_box_sides_are_the_rounded_square_roots(area, ratio, height, width):
    """Against floating point, which agrees except where a root falls on a half."""
    target = area / ONE * height * width
    box_width = math.sqrt(target * ratio / ONE)
    box_height = math.sqrt(target / (ratio / ONE))
    if any(abs(side % 1 - 0.5) < 1e-6 for side in (box_width, box_height)):
        return
    box_width, box_height = round(box_width), round(box_height)
    fits = 0 < box_width <= width and 0 < box_height <= height
    params = [area, ratio, 0, 2**32 - 1] * 10
    expected = Box(0, width - box_width, box_height, box_width) if fits else None
    assert first_fit(params, height, width, room=0) == expected


def test_the_first_attempt_that_fits_is_taken():
    too_wide = [ONE, 4 * ONE, 0, 0]
    fits = [ONE // 4, ONE, 1 << 31, 0]
    other = [ONE // 2, ONE, 0, 0]
    params = too_wide * 3 + fits + other * 6
    assert first_fit(params, 100, 100, room=0) == Box(25, 0, 50, 50)


def test_a_crop_may_reach_from_edge_to_edge(synthetic):
    op = RandomResizedCrop(recipe.RandomResizedCrop(), 32)
    image = synthetic(sizes=((100, 100),)).image(0)
    left_half = functional.resize(functional.crop(image, 0, 0, 100, 50), [32, 32])
    np.testing.assert_array_equal(op.apply(image, [ONE // 2, ONE // 2, 0, 0] * 10), left_half)


@pytest.mark.parametrize(
    ("size", "ratio", "box"),
    [
        ((1, 400), (0.75, 4 / 3), (199, 0, 1, 1)),
        ((400, 1), (0.75, 4 / 3), (0, 199, 1, 1)),
        ((30, 90), (0.75, 4 / 3), (25, 0, 40, 30)),
        ((1, 400), (90, 100), (199, 0, 1, 1)),
        ((400, 1), (0.01, 0.02), (0, 199, 1, 1)),
        ((30, 30), (0.75, 4 / 3), (0, 0, 30, 30)),
    ],
)
def test_an_image_that_no_attempt_fits_is_cropped_in_the_middle(size, ratio, box):
    op = RandomResizedCrop(recipe.RandomResizedCrop(ratio=ratio), 32)
    never = [2 * ONE, ONE, 0, 0] * 10
    image = Image.new("RGB", size)
    pixels = np.asarray(image).copy()
    top, left, height, width = box
    pixels[top : top + height, left : left + width] = 255
    framed = op.apply(Image.fromarray(pixels), never)
    assert np.asarray(framed).min() == 255
    assert op._fallback(size[1], size[0]) == Box(*box)
