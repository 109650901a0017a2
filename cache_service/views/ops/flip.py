"""Mirroring. Exact on any machine: pixels are copied.

Shape letters: B samples, W words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from cache_service.format import recipe
from cache_service.views.draws import Ints, chance
from cache_service.views.ops import on_pil
from cache_service.views.philox import Words


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
