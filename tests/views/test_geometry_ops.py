"""Turning, shifting, scaling and leaning: draws fill their ranges, pixels are where they should."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cache_service.format import recipe
from cache_service.views.draws import ONE
from cache_service.views.geometry_ops import RandomAffine

ALL = recipe.RandomAffine(degrees=30, translate=0.25, scale=(0.5, 2.0), shear=20)
STILL = [0, 0, 0, ONE, 0]


def moved(**changes):
    """Parameters of one move: degrees, px, px, factor, degrees."""
    names = ("angle", "right", "down", "scale", "lean")
    values = dict(zip(names, STILL, strict=True)) | {k: int(v * ONE) for k, v in changes.items()}
    return list(values.values())


def transcribed(pixels_HW3, angle, right, down, scale, lean):
    """Each pixel by itself: through the inverse map to its source, there a weighted mean of four.

    The forward map about the middle is: lean along x, turn clockwise, scale, shift.
    """
    height, width, _ = pixels_HW3.shape
    turn, slant = np.radians(angle), np.radians(lean)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    inverse = np.linalg.inv(scale * turned @ np.array([[1.0, -np.tan(slant)], [0.0, 1.0]]))
    middle = np.array([width / 2, height / 2])
    out = np.zeros(pixels_HW3.shape)
    for y in range(height):
        for x in range(width):
            place = np.array([x + 0.5 - right, y + 0.5 - down]) - middle
            source_x, source_y = inverse @ place + middle
            if not (0 <= source_x < width and 0 <= source_y < height):
                continue
            left, top = np.floor(source_x - 0.5), np.floor(source_y - 0.5)
            to_right, to_bottom = source_x - 0.5 - left, source_y - 0.5 - top
            columns = np.clip([left, left + 1], 0, width - 1).astype(int)
            rows = np.clip([top, top + 1], 0, height - 1).astype(int)
            four = pixels_HW3[np.ix_(rows, columns)].astype(float)
            upper, lower = four[:, 0] * (1 - to_right) + four[:, 1] * to_right
            out[y, x] = upper * (1 - to_bottom) + lower * to_bottom
    return out


@pytest.fixture
def image(synthetic):
    return synthetic(sizes=((20, 16),)).image(2)


def test_draws_fill_their_ranges_evenly(draw, assert_uniform):
    params = draw(RandomAffine(ALL, 32), 20_000)
    low, high = params.min(axis=0) / ONE, params.max(axis=0) / ONE
    np.testing.assert_allclose(low, [-30, -8, -8, 0.5, -20], atol=0.02)
    np.testing.assert_allclose(high, [30, 8, 8, 2, 20], atol=0.02)
    for column in params.T:
        tenths = (column - column.min()) * 10 // (np.ptp(column) + 1)
        assert_uniform(tenths, 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"angle": 30},
        {"angle": -7.25, "scale": 1.1},
        {"right": 3},
        {"down": -2.5},
        {"scale": 0.5},
        {"scale": 2},
        {"lean": 20},
        {"lean": -20, "angle": 12},
        {"angle": 30, "right": 3.5, "down": 1.25, "scale": 0.75, "lean": 10},
    ],
    ids=str,
)
def test_pixels_are_those_of_the_formula(image, changes):
    params = moved(**changes)
    ours = np.asarray(RandomAffine(ALL, 16).apply(image, params)).astype(float)
    direct = transcribed(np.asarray(image), *(value / ONE for value in params))
    # Pillow cuts where the formula has fractions; at the border of what is black, a pixel whose
    # source lies on the edge itself may fall on either side.
    off = np.abs(ours - direct).max(axis=-1) > 1.001
    assert off.mean() < 0.01


def test_without_any_move_the_image_is_given_back(image, draw):
    settings = recipe.RandomAffine(degrees=0)
    op = RandomAffine(settings, 16)
    assert draw(op, 3).tolist() == [STILL] * 3
    assert op.apply(image, STILL) is image


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"right": 2}, [(3, 1)]),
        ({"down": 2}, [(1, 3)]),
        ({"angle": 90}, [(6, 1)]),
    ],
)
def test_moves_go_right_down_and_clockwise(changes, expected):
    dot = Image.new("RGB", (8, 8))
    dot.putpixel((1, 1), (200, 100, 50))
    seen = RandomAffine(ALL, 8).apply(dot, moved(**changes))
    bright = np.argwhere(np.asarray(seen)[..., 0] > 150)
    assert [(x, y) for y, x in bright.tolist()] == expected


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (7, 9)])
def test_the_size_of_odd_and_tiny_images_is_kept(synthetic, draw, size):
    image = synthetic(sizes=(size,)).image(0)
    before = image.tobytes()
    op = RandomAffine(ALL, 8)
    for params in draw(op, 40).tolist():
        assert op.apply(image, params).size == size
    assert image.tobytes() == before
