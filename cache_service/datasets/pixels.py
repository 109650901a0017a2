"""Converts images of any common type to PIL images in RGB.

Views have 8 bits per channel. The pixels of a deeper image do not tell which value is white (65535,
4095 for a 12-bit camera, 1.0), and a wrong guess gives entirely white or black images. The setting
`pixel_range` therefore defines it. This module does not import torch.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

DECODE_ERRORS = (
    OSError,  # includes PIL's UnidentifiedImageError and its truncated files
    EOFError,
    SyntaxError,  # raised by PIL for a broken PNG
    ValueError,
    OverflowError,
    RuntimeError,  # raised by torchvision.io for a broken file
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
)
"""Exceptions of libraries for damaged image files. Other exceptions are bugs and not caught."""


PixelRange = tuple[float, float]
"""The values of black and white."""

DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
"""Pillow's modes of more than 8 bits per channel. Conversion to RGB clips them to 0..255."""


class PixelRangeError(ValueError):
    """The pixels do not have 8 bits, and their range is not given or is too small."""


def to_rgb(
    image: Any, pixel_range: PixelRange | None = None, *, owned: bool = False
) -> PIL.Image.Image:
    """Decode an image to one in RGB that does not depend on an open file.

    Args:
        image: a PIL image of any mode, or pixels [H, W], [H, W, 1] or [H, W, 3] as an array or a
            CPU tensor. Types other than 8 bits need `pixel_range`. An alpha channel is dropped.
        pixel_range: values of black and white, which are mapped linearly to 0 and 255 and rounded.
            8-bit pixels are not changed.
        owned: whether nobody else has this PIL image. Otherwise the result is a copy, so that a
            pipeline which paints on it does not change a dataset in memory.

    Raises:
        PixelRangeError: the pixels do not have 8 bits, and no range is given or it is too small.
        ValueError: the object is not an image. The message names its type.
    """
    if isinstance(image, PIL.Image.Image) and not (image.width and image.height):
        raise ValueError(f"the image has {image.width} x {image.height} pixels")
    if not isinstance(image, PIL.Image.Image):
        return _from_pixels(image, pixel_range)
    if image.mode in DEEP_MODES:
        what = f"the image has mode {image.mode}"
        return PIL.Image.fromarray(_to_8_bits(np.asarray(image), pixel_range, what)).convert("RGB")
    if _is_cut_to_8_bits(image) and pixel_range != (0, 65535):
        # Pillow decodes only the high byte, so the low byte is lost for any other range.
        given = f"; pixel_range is {list(pixel_range)}" if pixel_range else ""
        raise PixelRangeError(
            f"the image has 16 bits a color, of which Pillow keeps the upper 8: right only if "
            f"white is 65535{given}"
        )
    decoded: PIL.Image.Image = image
    if owned and image.mode == "RGB":
        image.load()
        return decoded
    if image.mode == "P" and "transparency" in image.info:
        # Direct conversion to RGB gives the same colors, but a warning for every such file.
        decoded = decoded.convert("RGBA")
    return decoded.convert("RGB")


def _is_cut_to_8_bits(image: PIL.Image.Image) -> bool:
    """Return whether decoding an open file would drop the low byte of 16-bit channels."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(each, str) and ";16" in each for each in arguments):
            return True
    return False


def _from_pixels(image: Any, pixel_range: PixelRange | None) -> PIL.Image.Image:
    expected = "expected a PIL image or uint8 pixels of shape [H, W] or [H, W, 3]"
    if not hasattr(image, "__array__"):
        raise ValueError(f"the image is of type {type(image).__name__}; {expected}")
    pixels = np.asarray(image)
    what = f"the image is {pixels.dtype}{list(np.shape(image))}"
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype.kind not in "buif" or not (pixels.ndim == 2 or pixels.shape[2:] == (3,)):
        raise ValueError(f"{what}; {expected}")
    if not pixels.size:
        raise ValueError(f"{what}: it has no pixels")
    if pixels.dtype != np.uint8:
        pixels = _to_8_bits(pixels, pixel_range, what)
    image_of_copy = PIL.Image.fromarray(np.ascontiguousarray(pixels))
    return image_of_copy if image_of_copy.mode == "RGB" else image_of_copy.convert("RGB")


def _to_8_bits(
    pixels: NDArray[Any], pixel_range: PixelRange | None, what: str
) -> NDArray[np.uint8]:
    values = pixels.astype(np.float64)
    lowest, highest = values.min(initial=np.inf), values.max(initial=-np.inf)
    what = f"{what} with values from {lowest:g} to {highest:g}"
    if pixel_range is None:
        raise PixelRangeError(f"{what}, and nothing says which value is white")
    black, white = pixel_range
    if not (lowest >= black and highest <= white):  # also refuses NaN
        raise PixelRangeError(f"{what}, outside of pixel_range {list(pixel_range)}")
    return np.rint((values - black) * (255 / (white - black))).astype(np.uint8)
