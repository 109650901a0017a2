"""Random boxes of a drawn area and aspect ratio, shared by resized crops and erasing.

Ten attempts are drawn before the image is known; the first that fits is taken. Sides follow by
integer square roots, so that no rounding mode or math library can move a box by a pixel.

Shape letters: B samples, W words, P parameters.
Source: torchvision's RandomResizedCrop.get_params and RandomErasing.get_params, whose attempts
these are; there sides are rounded in floating point, here exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

import numpy as np

from cache_service.views.draws import ONE, Ints, log_uniform_fixed, uniform_fixed
from cache_service.views.philox import Words

NUM_ATTEMPTS = 10
_WORDS_PER_ATTEMPT = 3
_PARAMS_PER_ATTEMPT = 4
BOX_WORDS = NUM_ATTEMPTS * _WORDS_PER_ATTEMPT
_HALF_WORD = np.uint64(32)
"""One word gives both places, each a 32-bit fraction of the room left once the sides are known."""
_LOW_HALF = np.uint64(0xFFFFFFFF)


class Box(NamedTuple):
    """A rectangle in an image, px."""

    top: int
    left: int
    height: int
    width: int


def draw_boxes(words_BW: Words, area: tuple[float, float], ratio: tuple[float, float]) -> Ints:
    """Attempts of each sample, [B, 40]: area share, ratio (width / height), top, left of each."""
    words_BAW = words_BW.reshape(len(words_BW), NUM_ATTEMPTS, _WORDS_PER_ATTEMPT)
    params_BAP = np.empty((len(words_BW), NUM_ATTEMPTS, _PARAMS_PER_ATTEMPT), dtype=np.int64)
    params_BAP[..., 0] = uniform_fixed(words_BAW[..., 0], *area)
    params_BAP[..., 1] = log_uniform_fixed(words_BAW[..., 1], *ratio)
    params_BAP[..., 2] = (words_BAW[..., 2] >> _HALF_WORD).astype(np.int64)
    params_BAP[..., 3] = (words_BAW[..., 2] & _LOW_HALF).astype(np.int64)
    return params_BAP.reshape(len(words_BW), NUM_ATTEMPTS * _PARAMS_PER_ATTEMPT)


def first_fit(params: Sequence[int], height: int, width: int, *, room: int) -> Box | None:
    """The first attempt that leaves at least `room` px in both directions, or None."""
    pixels = height * width
    for start in range(0, NUM_ATTEMPTS * _PARAMS_PER_ATTEMPT, _PARAMS_PER_ATTEMPT):
        area, ratio, top, left = params[start : start + _PARAMS_PER_ATTEMPT]
        target = area * pixels
        box_width = (isqrt(4 * target * ratio) + ONE) // (2 * ONE)
        box_height = (isqrt(4 * target // ratio) + 1) // 2
        if 0 < box_width <= width - room and 0 < box_height <= height - room:
            return Box(
                top * (height - box_height + 1) >> 32,
                left * (width - box_width + 1) >> 32,
                box_height,
                box_width,
            )
    return None
