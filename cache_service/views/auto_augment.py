"""RandAugment and TrivialAugment: random ops from one table, at one or at random magnitudes.

The fourteen ops, their ranges and their 31 levels are torchvision's. Magnitudes are exact here
(torchvision computes them in float32, so that a shift of 16 px can come out as 15); shears are
multiples of 1/4096, coarse enough that the tangent taken on the way to Pillow's 16-bit fixed-point
matrix cannot round two ways.

Shape letters: B samples, W words.
Source: Cubuk et al., RandAugment (2020); Mueller and Hutter, TrivialAugment (2021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import atan, degrees

import numpy as np
from PIL import Image

from cache_service.format import recipe
from cache_service.views import on_pil
from cache_service.views.draws import ONE, Ints, Words, below, chance, to_fixed

NUM_LEVELS = 31
_TOP_LEVEL = NUM_LEVELS - 1
_SHEAR_STEPS = 4096


def _affine(
    image: Image.Image, *, shift: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)
) -> Image.Image:
    # torchvision takes angles and shears about the top left corner, as RandAugment's authors did.
    angles = [degrees(atan(s)) for s in shear]
    center = [0.0, 0.0] if any(shear) else None
    return on_pil.affine(
        image, angle=0.0, translate=list(shift), scale=1.0, shear=angles, center=center
    )


_APPLY: Mapping[str, Callable[[Image.Image, int], Image.Image]] = {
    "identity": lambda image, _: image,
    "shear_x": lambda image, m: _affine(image, shear=(m / ONE, 0.0)),
    "shear_y": lambda image, m: _affine(image, shear=(0.0, m / ONE)),
    "translate_x": lambda image, m: _affine(image, shift=(m, 0)),
    "translate_y": lambda image, m: _affine(image, shift=(0, m)),
    "rotate": lambda image, m: on_pil.rotate(image, m / ONE),
    "brightness": lambda image, m: on_pil.adjust_brightness(image, 1 + m / ONE),
    "color": lambda image, m: on_pil.adjust_saturation(image, 1 + m / ONE),
    "contrast": lambda image, m: on_pil.adjust_contrast(image, 1 + m / ONE),
    "sharpness": lambda image, m: on_pil.adjust_sharpness(image, 1 + m / ONE),
    "posterize": on_pil.posterize,
    "solarize": lambda image, m: on_pil.solarize(image, m / ONE),
    "autocontrast": lambda image, _: on_pil.autocontrast(image),
    "equalize": lambda image, _: on_pil.equalize(image),
}
"""Ops by name, in the order that a draw's index means. px, bits, or 65536ths."""

OP_NAMES = tuple(_APPLY)
_FUNCTIONS = tuple(_APPLY.values())
_SIGNED = np.array([1 <= i <= 9 for i in range(len(OP_NAMES))])
"""Shears to sharpness go both ways; bits and thresholds do not."""


class RandAugment:
    """`num_ops` ops, one after the other, all at one level."""

    def __init__(self, settings: recipe.RandAugment, size: int) -> None:
        self.num_words = 2 * settings.num_ops
        self._magnitude_O = _narrow(size)[:, settings.magnitude]

    def draw(self, words_BW: Words) -> Ints:
        """Op and signed magnitude, `num_ops` times."""
        op_BK = below(words_BW[:, 0::2], len(OP_NAMES))
        magnitude_BK = _signed(op_BK, self._magnitude_O[op_BK], words_BW[:, 1::2])
        return np.stack([op_BK, magnitude_BK], axis=2).reshape(words_BW.shape)

    def apply(self, image: Image.Image, params: Sequence[int]) -> Image.Image:
        """The image after all ops."""
        for op, magnitude in zip(params[0::2], params[1::2], strict=True):
            image = _FUNCTIONS[op](image, magnitude)
        return image


class TrivialAugment:
    """One op at a random level, over wider ranges."""

    num_words = 3

    def __init__(self, settings: recipe.TrivialAugment, size: int) -> None:
        del settings, size
        self._magnitude_OL = _wide()

    def draw(self, words_BW: Words) -> Ints:
        """Op and signed magnitude."""
        op_B = below(words_BW[:, 0], len(OP_NAMES))
        level_B = below(words_BW[:, 1], NUM_LEVELS)
        magnitude_B = _signed(op_B, self._magnitude_OL[op_B, level_B], words_BW[:, 2])
        return np.stack([op_B, magnitude_B], axis=1)

    def apply(self, image: Image.Image, params: Sequence[int]) -> Image.Image:
        """The image after the op."""
        return _FUNCTIONS[params[0]](image, params[1])


def _signed(ops: Ints, magnitudes: Ints, words: Words) -> Ints:
    return np.where(_SIGNED[ops] & chance(words, 0.5), -magnitudes, magnitudes)


def _narrow(size: int) -> Ints:
    """RandAugment's magnitudes, [op, level]. Shifts reach 150/331 of the side, as for ImageNet."""
    return _magnitudes(shear=0.3, shift=(150 * size, 331), angle=30.0, blend=0.9, bits=4)


def _wide() -> Ints:
    """TrivialAugment's magnitudes, [op, level]."""
    return _magnitudes(shear=0.99, shift=(32, 1), angle=135.0, blend=0.99, bits=6)


def _magnitudes(
    *, shear: float, shift: tuple[int, int], angle: float, blend: float, bits: int
) -> Ints:
    table_OL = np.zeros((len(OP_NAMES), NUM_LEVELS), dtype=np.int64)
    for level in range(NUM_LEVELS):
        fraction = level / _TOP_LEVEL
        sheared = int(shear * fraction * _SHEAR_STEPS + 0.5) * (ONE // _SHEAR_STEPS)
        shifted = shift[0] * level // (shift[1] * _TOP_LEVEL)
        blended = to_fixed(blend * fraction)
        kept_bits = 8 - (2 * bits * level + _TOP_LEVEL) // (2 * _TOP_LEVEL)
        table_OL[1:12, level] = [
            *(sheared, sheared, shifted, shifted, to_fixed(angle * fraction)),
            *(blended, blended, blended, blended),
            *(kept_bits, to_fixed(255 * (1 - fraction))),
        ]
    return table_OL
