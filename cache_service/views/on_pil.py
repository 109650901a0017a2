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
crop: _ToImage = _untyped.crop
equalize: _ToImage = _untyped.equalize
horizontal_flip: _ToImage = _untyped.horizontal_flip
pad: _ToImage = _untyped.pad
posterize: _ToImage = _untyped.posterize
resize: _ToImage = _untyped.resize
resized_crop: _ToImage = _untyped.resized_crop
rotate: _ToImage = _untyped.rotate
solarize: _ToImage = _untyped.solarize
