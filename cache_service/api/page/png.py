"""Pixels -> PNG with nothing but zlib, so that the server can draw without Pillow. Pure.

Shape letters: H W pixels.
"""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"

TRUE_COLOR_8 = (8, 2, 0, 0, 0)
"""Bits per channel, color type RGB, and the only compression, filter and interlace there are."""


def encode_png(pixels_HW3: NDArray[np.uint8]) -> bytes:
    """An RGB PNG.

    Args:
        pixels_HW3: uint8.

    Source: PNG specification, third edition: signature, IHDR, IDAT, IEND.
    """
    height, width = pixels_HW3.shape[:2]
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # a line's first byte 0: not filtered
    lines[:, 1:] = pixels_HW3.reshape(height, 3 * width)
    return b"".join(
        (
            SIGNATURE,
            _chunk(b"IHDR", struct.pack(">II5B", width, height, *TRUE_COLOR_8)),
            _chunk(b"IDAT", zlib.compress(lines.tobytes(), 6)),
            _chunk(b"IEND", b""),
        )
    )


def data_url(png: bytes) -> str:
    """A PNG as the address of an image."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
