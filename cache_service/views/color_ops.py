"""Ops that change colors: random jitter, and erasing a random box.

Shape letters: B samples or boxes, K blocks of words, W words, P parameters, Q pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache_service.format import recipe
from cache_service.views import on_pil
from cache_service.views.draws import (
    ONE,
    WORDS_PER_BLOCK,
    Ints,
    Words,
    below,
    chance,
    philox_blocks,
    uniform_fixed,
)
from cache_service.views.geometry_ops import BOX_WORDS, Box, draw_boxes, first_fit

_ORDERS = tuple(permutations(range(4)))
"""The 24 orders of the four adjustments; a draw names one by its index here."""

_ADJUST = (
    on_pil.adjust_brightness,
    on_pil.adjust_contrast,
    on_pil.adjust_saturation,
    on_pil.adjust_hue,
)


class ColorJitter:
    """Brightness, contrast, saturation and hue in a random order, each by a factor of its own.

    Source: torchvision's ColorJitter.
    """

    num_words = 6

    def __init__(self, settings: recipe.ColorJitter, size: int) -> None:
        del size
        self._prob = settings.prob
        widths = (settings.brightness, settings.contrast, settings.saturation)
        self._ranges = [(max(0.0, 1 - s), 1 + s) for s in widths] + [(-settings.hue, settings.hue)]
        self._active = [low < high for low, high in self._ranges]

    def draw(self, words_BW: Words) -> Ints:
        """Whether at all, the order, then the four factors (hue: a fraction of the color
        circle)."""
        columns = [
            chance(words_BW[:, 0], self._prob).astype(np.int64),
            below(words_BW[:, 1], len(_ORDERS)),
        ]
        columns += [uniform_fixed(words_BW[:, 2 + i], *self._ranges[i]) for i in range(4)]
        return np.stack(columns, axis=1)

    def apply(self, image: Image.Image, params: Sequence[int]) -> Image.Image:
        """The adjusted image; an adjustment without a range is left out, not applied as 1."""
        happens, order, *factors = params
        if happens:
            for which in _ORDERS[order]:
                if self._active[which]:
                    image = _ADJUST[which](image, factors[which] / ONE)
        return image


MEAN_COLOR = (124, 116, 104)
"""ImageNet's mean (0.485, 0.456, 0.406) of 255, rounded."""

NOISE_KEY = int.from_bytes(b"kd-noise", "big")
"""Key of the streams that noise is made from."""


class RandomErasing:
    """Erase the first of ten random boxes that fits strictly inside the view.

    Source: Zhong et al., Random Erasing (2020); boxes as in torchvision's RandomErasing. Noise is
    uniform over the 256 levels because a view is uint8; torchvision's is normal, after
    normalization.
    """

    num_words = 2 + BOX_WORDS

    def __init__(self, settings: recipe.RandomErasing, size: int) -> None:
        del size
        self._settings = settings

    def draw(self, words_BW: Words) -> Ints:
        """Whether at all, the key of the noise (64 bits, as int64), then ten attempts at a box."""
        settings = self._settings
        happens_B = chance(words_BW[:, 0], settings.prob)
        boxes_BP = draw_boxes(words_BW[:, 2:], settings.area, settings.ratio)
        return np.column_stack([happens_B, words_BW[:, 1].view(np.int64), boxes_BP])

    def apply(self, image: Image.Image, params: Sequence[int]) -> Image.Image:
        """A copy with the box overwritten, or the image where nothing is erased."""
        if not params[0]:
            return image
        box = first_fit(params[2:], image.height, image.width, room=1)
        if box is None:
            return image
        image = image.copy()
        if self._settings.fill == "noise":
            image.paste(_noise(params[1], box), (box.left, box.top))
        else:
            corners = (box.left, box.top, box.left + box.width, box.top + box.height)
            image.paste(MEAN_COLOR, corners)
        return image


def _noise(key: int, box: Box) -> Image.Image:
    """Uniform uint8 noise: the bytes of a Philox stream of its own, in little-endian order."""
    num_bytes = 3 * box.height * box.width
    stream = np.random.Philox(key=np.array([NOISE_KEY, key % 2**64], dtype=np.uint64))
    words = stream.random_raw(-(-num_bytes // 8)).astype("<u8")
    levels_HW3 = words.view(np.uint8)[:num_bytes].reshape(box.height, box.width, 3)
    return Image.fromarray(levels_HW3)


def noise_of_boxes(keys_B: Ints, pixels_B: Ints) -> NDArray[np.uint8]:
    """The noise of many boxes, one after the other: [Q, 3], as `_noise` makes it for one.

    Args:
        keys_B: key of each box.
        pixels_B: number of pixels of each box.
    """
    bytes_per_block = 8 * WORDS_PER_BLOCK
    blocks_B = -(-3 * pixels_B // bytes_per_block)
    first_B = np.cumsum(blocks_B) - blocks_B
    counters_4K = np.zeros((4, int(blocks_B.sum())), dtype=np.uint64)
    # NumPy steps the counter before its first block, so blocks count from 1.
    counters_4K[0] = 1 + np.arange(counters_4K.shape[1]) - np.repeat(first_B, blocks_B)
    keys_K = np.repeat(keys_B.view(np.uint64), blocks_B)
    words_4K = philox_blocks((NOISE_KEY, keys_K), counters_4K)
    levels = np.ascontiguousarray(words_4K.T).astype("<u8", copy=False).view(np.uint8).reshape(-1)
    # The last block of a box has bytes beyond its end.
    place = np.arange(len(levels)) - np.repeat(
        first_B * bytes_per_block, blocks_B * bytes_per_block
    )
    return levels[place < np.repeat(3 * pixels_B, blocks_B * bytes_per_block)].reshape(-1, 3)
