"""The functions that bypass torchvision's dispatch give its pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torchvision.transforms.v2.functional as torchvision_functional
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cache_service.views import on_pil

SIDES = st.integers(1, 40)


def image_of(width, height, salt=0):
    pixels = np.random.default_rng(salt).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@given(SIDES, SIDES, st.integers(-9, 30), st.integers(-9, 30), SIDES, SIDES)
def test_a_crop_is_torchvisions_also_outside_of_the_image(width, height, top, left, rows, columns):
    image, box = image_of(width, height), (top, left, rows, columns)
    assert on_pil.crop(image, *box) == torchvision_functional.crop(image, *box)


@given(st.data(), SIDES, SIDES, st.integers(1, 24), st.sampled_from(["bilinear", "bicubic"]))
def test_a_resized_crop_is_torchvisions(data, width, height, size, mode):
    rows, columns = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - rows)), data.draw(st.integers(0, width - columns))
    image, box = image_of(width, height), (top, left, rows, columns)
    wanted = torchvision_functional.resized_crop(
        image, *box, size=[size, size], interpolation=on_pil.MODES[mode]
    )
    assert on_pil.resized_crop(image, box, size, on_pil.RESAMPLE[mode]) == wanted


@pytest.mark.parametrize("size", [(1, 1), (7, 4)])
def test_a_flip_is_torchvisions(size):
    image = image_of(*size)
    assert on_pil.horizontal_flip(image) == torchvision_functional.horizontal_flip(image)
