"""Turning, shifting, scaling and leaning an image, by one resampling.

torchvision's `RandomAffine` with bilinear interpolation. The map is in float64 here and in Pillow,
so on another kind of CPU a value within the last bits of a whole level may come out one level
apart: the digest would say so. Draws are integers, alike everywhere.

Shape letters: B samples, W words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode

from cache_service.format import recipe
from cache_service.views.draws import ONE, Ints, uniform_fixed
from cache_service.views.ops import on_pil
from cache_service.views.philox import Words

_IDENTITY = [0, 0, 0, ONE, 0]


class RandomAffine:
    """Angle, shifts, scale and lean of each view, about its middle; what comes in is black."""

    num_words = len(_IDENTITY)

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
        """Degrees clockwise, px to the right, px down, scale, degrees of lean: all fixed."""
        drawn = (uniform_fixed(words_BW[:, i], *span) for i, span in enumerate(self._ranges))
        return np.column_stack(list(drawn))

    def apply(self, image: Image.Image, params: Sequence[int]) -> Image.Image:
        """The image moved, of the same size."""
        if list(params) == _IDENTITY:
            return image
        angle, right, down, scale, lean = (value / ONE for value in params)
        return on_pil.affine(
            image,
            angle=angle,
            translate=[right, down],
            scale=scale,
            shear=[lean, 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )
