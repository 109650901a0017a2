"""Bytes that identify: canonical JSON and the two checksums used everywhere."""

from __future__ import annotations

import hashlib
import json

import google_crc32c
import numpy as np

Buffer = bytes | memoryview
"""Contiguous bytes."""


def canonical_json(document: object) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal documents give equal bytes."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def sha256_hex(content: bytes) -> str:
    """sha256 as 64 lower-case hexadecimal digits: used where bytes must not be forged."""
    return hashlib.sha256(content).hexdigest()


def crc32c(*pieces: Buffer, start: int = 0) -> int:
    """CRC-32C (Castagnoli) as an unsigned integer: used where bytes must not be damaged.

    Pieces may be any contiguous bytes-like objects; several count as one after the other. 7 GB/s,
    so checking a chunk costs less than copying it. `start` is the CRC-32C of what comes before.
    """
    value = start
    for piece in pieces:
        # The library takes bytes and arrays, not memoryviews; the array is a view, not a copy.
        plain = piece if isinstance(piece, bytes) else np.frombuffer(piece, np.uint8)
        value = google_crc32c.extend(value, plain)
    return value
