"""Whatever a dataset calls an image -> a PIL image in RGB. No torch."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image

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


def to_rgb(image: Any) -> PIL.Image.Image:
    """A decoded copy in RGB, independent of any open file.

    Takes a PIL image of any mode, or uint8 pixels [H, W], [H, W, 1] or [H, W, 3] as an array or a
    CPU tensor. Samples wider than 8 bits are clipped to 0..255, as in torchvision's loader.

    Raises:
        ValueError: it is something else; the text says what it was.
    """
    if not isinstance(image, PIL.Image.Image):
        return _from_pixels(image)
    decoded: PIL.Image.Image = image
    if image.mode == "P" and "transparency" in image.info:
        # The direct way to RGB gives the same colors and a warning for every such file.
        decoded = decoded.convert("RGBA")
    return decoded.convert("RGB")


def one_line(error: BaseException) -> str:
    """The name and the text of an error, for a message of one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def _from_pixels(image: Any) -> PIL.Image.Image:
    wanted = "wanted a PIL image or uint8 pixels of shape [H, W] or [H, W, 3]"
    if not hasattr(image, "__array__"):
        raise ValueError(f"the image is of type {type(image).__name__}; {wanted}")
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or pixels.shape[2:] == (3,)):
        raise ValueError(f"the image is {pixels.dtype}{list(np.shape(image))}; {wanted}")
    return PIL.Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
