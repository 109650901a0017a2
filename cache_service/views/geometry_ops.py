"""Ops that move pixels: crops, flips and affine maps, and the random boxes of crops and erasing.

Crops take an image of any size, and give a square of the view's size; smaller images are enlarged,
and an image one pixel wide is an image. Padding and mirroring copy pixels, so they are exact on any
machine.

Shape letters: B samples, W words, A attempts, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode

from cache_service.format import recipe
from cache_service.views import on_pil
from cache_service.views.draws import (
    ONE,
    Ints,
    Words,
    below,
    chance,
    log_uniform_fixed,
    to_fixed,
    uniform_fixed,
)
from cache_service.views.on_pil import MODES

NUM_ATTEMPTS = 10
_WORDS_PER_ATTEMPT = 3
_PARAMS_PER_ATTEMPT = 4
BOX_WORDS = NUM_ATTEMPTS * _WORDS_PER_ATTEMPT
_HALF_WORD = np.uint64(32)
"""One word gives both places, each a 32-bit fraction of the room left once the sides are known."""
_LOW_HALF = np.uint64(0xFFFFFFFF)


_LONGEST_ASPECT = 4
"""Beyond this aspect the ends are cut before resizing: they are never seen, but a 1 x 10000 image
resized whole to a shorter side of 224 would take 1.5 GB."""

_NOT_MOVED = [0, 0, 0, ONE, 0]
"""Parameters of an affine map that leaves the image as it is."""


class Box(NamedTuple):
    """A rectangle in an image, px."""

    top: int
    left: int
    height: int
    width: int


def draw_boxes(words_BW: Words, area: tuple[float, float], ratio: tuple[float, float]) -> Ints:
    """Ten attempts of each sample, drawn before the image is known; see `first_fit`.

    Returns:
        [B, 40]: of each attempt the fraction of the area, width / height, top and left.

    Source: torchvision's RandomResizedCrop.get_params and RandomErasing.get_params.
    """
    words_BAW = words_BW.reshape(len(words_BW), NUM_ATTEMPTS, _WORDS_PER_ATTEMPT)
    params_BAP = np.empty((len(words_BW), NUM_ATTEMPTS, _PARAMS_PER_ATTEMPT), dtype=np.int64)
    params_BAP[..., 0] = uniform_fixed(words_BAW[..., 0], *area)
    params_BAP[..., 1] = log_uniform_fixed(words_BAW[..., 1], *ratio)
    params_BAP[..., 2] = (words_BAW[..., 2] >> _HALF_WORD).astype(np.int64)
    params_BAP[..., 3] = (words_BAW[..., 2] & _LOW_HALF).astype(np.int64)
    return params_BAP.reshape(len(words_BW), NUM_ATTEMPTS * _PARAMS_PER_ATTEMPT)


def first_fit(params: Sequence[int], height: int, width: int, *, room: int) -> Box | None:
    """The first attempt that leaves at least `room` px in both directions, or None.

    Sides follow by integer square roots, where torchvision rounds in floating point, so that no
    rounding mode or math library can move a box by a pixel.
    """
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


class PadCrop:
    """Pad, then crop the view's size at a random place. Exact on any machine: pixels are copied."""

    num_words = 2

    def __init__(self, settings: recipe.PadCrop, size: int) -> None:
        self._size = size
        self._padding = settings.padding
        self._reflects = settings.mode == "reflect"

    def draw(self, words_BW: Words) -> Ints:
        """Top and left in the padded image, px."""
        return below(words_BW, 2 * self._padding + 1)

    def apply(self, image: Image.Image, params: Sequence[int]) -> Image.Image:
        """The crop; an image of another size is first resized and center-cropped (bilinear)."""
        size, padding = self._size, self._padding
        top, left = params
        if image.size != (size, size):
            image = center_square(image, size, size, MODES["bilinear"])
        if self._reflects:
            image = on_pil.pad(image, [padding] * 4, padding_mode="reflect")
            return on_pil.crop(image, top, left, size, size)
        # Pillow fills what lies outside the image with zeros, so the padding needs no image.
        return on_pil.crop(image, top - padding, left - padding, size, size)


class RandomResizedCrop:
    """Crop a random area and aspect ratio, then resize.

    Source: torchvision's RandomResizedCrop, with its ten attempts and its central fallback.
    """

    num_words = BOX_WORDS

    def __init__(self, settings: recipe.RandomResizedCrop, size: int) -> None:
        self._size = size
        self._area = settings.area
        self._ratio = settings.ratio
        self._resample = on_pil.RESAMPLE[settings.interpolation]

    def draw(self, words_BW: Words) -> Ints:
        """Ten attempts."""
        return draw_boxes(words_BW, self._area, self._ratio)

    def apply(self, image: Image.Image, params: Sequence[int]) -> Image.Image:
        """The first attempt that fits, else the largest central box of an allowed ratio."""
        width, height = image.size
        box = first_fit(params, height, width, room=0) or self._fallback(height, width)
        return on_pil.resized_crop(image, box, self._size, self._resample)

    def _fallback(self, height: int, width: int) -> Box:
        narrowest, widest = (max(1, to_fixed(r)) for r in self._ratio)
        box_height, box_width = height, width
        if width * ONE < narrowest * height:
            box_height = max(1, (2 * width * ONE + narrowest) // (2 * narrowest))
        elif width * ONE > widest * height:
            box_width = max(1, (2 * height * widest + ONE) // (2 * ONE))
        return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


class CenterCrop:
    """Resize the shorter side, then crop the middle. Draws nothing."""

    num_words = 0

    def __init__(self, settings: recipe.CenterCrop, size: int) -> None:
        self._size = size
        self._side = int(size / settings.crop_pct)
        self._mode = MODES[settings.interpolation]

    def draw(self, words_BW: Words) -> Ints:
        """No parameters."""
        return np.empty((len(words_BW), 0), dtype=np.int64)

    def apply(self, image: Image.Image, params: Sequence[int]) -> Image.Image:
        """The middle of the resized image."""
        del params  # an empty row
        return center_square(image, self._side, self._size, self._mode)


def center_square(image: Image.Image, side: int, size: int, mode: Any) -> Image.Image:
    """Resize the shorter side to `side` px, then crop the central `size` x `size`."""
    width, height = image.size
    longest = _LONGEST_ASPECT * min(width, height)
    if max(width, height) > longest:
        image = on_pil.center_crop(image, [min(height, longest), min(width, longest)])
    return on_pil.center_crop(on_pil.resize(image, [side], interpolation=mode), [size, size])


class HorizontalFlip:
    """Mirror left and right."""

    num_words = 1

    def __init__(self, settings: recipe.HorizontalFlip, size: int) -> None:
        del size
        self._prob = settings.prob

    def draw(self, words_BW: Words) -> Ints:
        """Whether to mirror, 0 or 1."""
        return chance(words_BW, self._prob).astype(np.int64)

    def apply(self, image: Image.Image, params: Sequence[int]) -> Image.Image:
        """The image or its mirror image."""
        return on_pil.horizontal_flip(image) if params[0] else image


class RandomAffine:
    """Rotate, shift, scale and shear about the middle, by one bilinear resampling; outside is
    black.

    Source: torchvision's RandomAffine. The map is in float64 here and in Pillow, so on another kind
    of CPU a value within the last bits of a whole level may come out one level apart; the digest
    would then differ. Draws are integers, alike everywhere.
    """

    num_words = len(_NOT_MOVED)

    def __init__(self, settings: recipe.RandomAffine, size: int) -> None:
        shift = settings.translate * size
        self._ranges = (
            (-settings.degrees, settings.degrees),
            (-shift, shift),
            (-shift, shift),
            settings.scale,
            (-settings.shear, settings.shear),
        )

    def draw(self, words_BW: Words) -> Ints:
        """Degrees clockwise, px to the right, px down, scale, degrees of shear: all fixed."""
        columns = [uniform_fixed(words_BW[:, i], *span) for i, span in enumerate(self._ranges)]
        return np.column_stack(columns)

    def apply(self, image: Image.Image, params: Sequence[int]) -> Image.Image:
        """The image moved, of the same size."""
        if list(params) == _NOT_MOVED:
            return image
        angle, right, down, scale, shear = (value / ONE for value in params)
        return on_pil.affine(
            image,
            angle=angle,
            translate=[right, down],
            scale=scale,
            shear=[shear, 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )
