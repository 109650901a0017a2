"""Ops that make a square of the view's size out of an image of any size.

Images smaller than the view are enlarged, and an image one pixel wide is an image.

Shape letters: B samples, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from cache_service.format import recipe
from cache_service.views.draws import ONE, Ints, below, to_fixed
from cache_service.views.ops import on_pil
from cache_service.views.ops.boxes import BOX_WORDS, Box, draw_boxes, first_fit
from cache_service.views.ops.on_pil import MODES
from cache_service.views.philox import Words

_LONGEST_ASPECT = 4
"""Beyond this aspect the ends are cut before resizing: they are never seen, but a 1 x 10000 image
resized whole to a shorter side of 224 would take 1.5 GB."""


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
        self._size = [size, size]
        self._area = settings.area
        self._ratio = settings.ratio
        self._mode = MODES[settings.interpolation]

    def draw(self, words_BW: Words) -> Ints:
        """Ten attempts."""
        return draw_boxes(words_BW, self._area, self._ratio)

    def apply(self, image: Image.Image, params: Sequence[int]) -> Image.Image:
        """The first attempt that fits, else the largest central box of an allowed ratio."""
        width, height = image.size
        box = first_fit(params, height, width, room=0) or self._fallback(height, width)
        return on_pil.resized_crop(image, *box, size=self._size, interpolation=self._mode)

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
