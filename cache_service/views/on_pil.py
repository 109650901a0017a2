"""torchvision's v2 functionals, as functions of PIL images.

torchvision annotates them for tensors, so this is the one place that says otherwise. Tensors never
pass here: torch's uint8 kernels round differently on different CPUs, Pillow's do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torchvision.transforms.v2.functional as _functional
from PIL import Image
from torchvision.transforms import InterpolationMode

MODES: dict[str, Any] = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}
"""A recipe's word for an interpolation to torchvision's. Both are antialiased on PIL images."""

_ToImage: TypeAlias = Callable[..., Image.Image]
_untyped: Any = _functional

adjust_brightness: _ToImage = _untyped.adjust_brightness
adjust_contrast: _ToImage = _untyped.adjust_contrast
adjust_hue: _ToImage = _untyped.adjust_hue
adjust_saturation: _ToImage = _untyped.adjust_saturation
adjust_sharpness: _ToImage = _untyped.adjust_sharpness
affine: _ToImage = _untyped.affine
autocontrast: _ToImage = _untyped.autocontrast
center_crop: _ToImage = _untyped.center_crop
equalize: _ToImage = _untyped.equalize
pad: _ToImage = _untyped.pad
posterize: _ToImage = _untyped.posterize
resize: _ToImage = _untyped.resize
rotate: _ToImage = _untyped.rotate
solarize: _ToImage = _untyped.solarize


# The three most frequent ones directly, because torchvision's dispatch takes 10 us of each call.

RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
"""A recipe's word for an interpolation to Pillow's."""


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """Crop a box; what lies outside the image is black."""
    return image.crop((left, top, left + width, top + height))


def resized_crop(
    image: Image.Image, box: tuple[int, int, int, int], size: int, resample: Image.Resampling
) -> Image.Image:
    """Crop (top, left, height, width) and resize the crop to a square."""
    part = crop(image, *box)
    return part if part.size == (size, size) else part.resize((size, size), resample)


def horizontal_flip(image: Image.Image) -> Image.Image:
    """Mirror left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
