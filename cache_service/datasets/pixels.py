"""Converts whatever a dataset calls an image to a PIL image in RGB. No torch.

Views are made of 8 bits a color. What white is in a deeper image (65535, 4095 of a 12-bit camera,
1.0) is not in its pixels, and a wrong guess gives white or black squares, so the setting
`pixel_range` says it.
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
    SyntaxError,  # PIL's word for a broken PNG
    ValueError,
    OverflowError,
    RuntimeError,  # torchvision.io's word for a broken file
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
)
"""What libraries raise for damaged image files. Anything else is a bug, and keeps its traceback."""


PixelRange = tuple[float, float]
"""Values of black and of white."""

DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
"""Pillow's modes of more than 8 bits a sample. Converting one to RGB clips it to 0..255."""


class PixelRangeError(ValueError):
    """Pixels that are not 8 bits deep, and their range is not given or does not hold them."""


def to_rgb(image: Any, pixel_range: PixelRange | None = None) -> PIL.Image.Image:
    """A decoded copy in RGB, independent of any open file.

    Takes a PIL image of any mode, or pixels [H, W], [H, W, 1] or [H, W, 3] as an array or a CPU
    tensor. An alpha channel is dropped.

    Args:
        image: of 8 bits a sample, or of any other type if `pixel_range` is given.
        pixel_range: values of black and white of pixels that are not 8 bits; mapped to 0 and 255
            linearly and rounded. 8-bit pixels stay as they are.

    Raises:
        PixelRangeError: the pixels are not 8 bits and no range is given, or leave the range.
        ValueError: it is something else; the text names it.
    """
    if not isinstance(image, PIL.Image.Image):
        return _from_pixels(image, pixel_range)
    if image.mode in DEEP_MODES:
        what = f"the image has mode {image.mode}"
        return PIL.Image.fromarray(_to_8_bits(np.asarray(image), pixel_range, what)).convert("RGB")
    if _is_cut_to_8_bits(image) and pixel_range != (0, 65535):
        # Pillow decodes to the high byte, so the low one is gone whatever the range.
        given = f"; pixel_range is {list(pixel_range)}" if pixel_range else ""
        raise PixelRangeError(
            f"the image has 16 bits a color, of which Pillow keeps the upper 8: right only if "
            f"white is 65535{given}"
        )
    decoded: PIL.Image.Image = image
    if image.mode == "P" and "transparency" in image.info:
        # The direct way to RGB gives the same colors and a warning for every such file.
        decoded = decoded.convert("RGBA")
    return decoded.convert("RGB")


def _is_cut_to_8_bits(image: PIL.Image.Image) -> bool:
    """Whether decoding a file that is open, but not decoded yet, drops the lower half of 16
    bits."""
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
    if pixels.dtype != np.uint8:
        pixels = _to_8_bits(pixels, pixel_range, what)
    return PIL.Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def _to_8_bits(
    pixels: NDArray[Any], pixel_range: PixelRange | None, what: str
) -> NDArray[np.uint8]:
    values = pixels.astype(np.float64)
    lowest, highest = values.min(initial=np.inf), values.max(initial=-np.inf)
    what = f"{what} with values from {lowest:g} to {highest:g}"
    if pixel_range is None:
        raise PixelRangeError(f"{what}, and nothing says which value is white")
    black, white = pixel_range
    if not (lowest >= black and highest <= white):  # NaN is in no range
        raise PixelRangeError(f"{what}, outside of pixel_range {list(pixel_range)}")
    return np.rint((values - black) * (255 / (white - black))).astype(np.uint8)
