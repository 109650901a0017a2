"""Random brightness, contrast, saturation and hue.

Shape letters: B samples, W words.
Source: torchvision's ColorJitter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
from PIL import Image

from cache_service.format import recipe
from cache_service.views.draws import ONE, Ints, below, chance, uniform_fixed
from cache_service.views.ops import on_pil
from cache_service.views.philox import Words

_ORDERS = tuple(permutations(range(4)))
"""The 24 orders of the four adjustments; a draw names one by its index here."""

_ADJUST = (
    on_pil.adjust_brightness,
    on_pil.adjust_contrast,
    on_pil.adjust_saturation,
    on_pil.adjust_hue,
)


class ColorJitter:
    """The four adjustments in a random order, each by a factor of its own."""

    num_words = 6

    def __init__(self, settings: recipe.ColorJitter, size: int) -> None:
        del size
        self._prob = settings.prob
        spreads = (settings.brightness, settings.contrast, settings.saturation)
        self._ranges = [(max(0.0, 1 - s), 1 + s) for s in spreads] + [(-settings.hue, settings.hue)]
        self._active = [low < high for low, high in self._ranges]

    def draw(self, words_BW: Words) -> Ints:
        """Whether at all, the order, then the four factors (hue: a share of the color circle)."""
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
