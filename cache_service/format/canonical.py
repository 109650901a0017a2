"""Bytes that identify: canonical JSON, the two checksums used everywhere, and joined checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache

import google_crc32c
import numpy as np

Buffer = bytes | memoryview
"""Contiguous bytes."""


def canonical_json(document: object) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal documents give equal bytes."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def sha256_hex(content: Buffer) -> str:
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


POLYNOMIAL = 0x82F63B78
"""Castagnoli's polynomial, bits reversed."""

Matrix = list[int]
"""32 columns over GF(2), each an integer of 32 bits."""

Tables = tuple[tuple[int, ...], ...]
"""What each value of each of the four bytes of a CRC contributes."""


def joined_crc32c(pieces: Iterable[tuple[Buffer, int | None]]) -> int:
    """CRC-32C of all pieces, one after the other.

    The checksum of a chunk is known since its commit. So a range of whole chunks need not be read,
    and its checksum is that of the committed bytes, even if the bytes have changed since.
    Source: Mark Adler's crc32_combine in zlib; appending zeros to a message is a linear map on its
    CRC.

    Args:
        pieces: bytes, and their CRC-32C or None. Those with a CRC-32C are not read.
    """
    value = 0
    for piece, known in pieces:
        if known is None:
            value = crc32c(piece, start=value)
        else:
            value = _apply(_tables_of_zeros(len(piece)), value) ^ known
    return value


def _apply(tables: Tables, value: int) -> int:
    first, second, third, fourth = tables
    return (
        first[value & 255]
        ^ second[value >> 8 & 255]
        ^ third[value >> 16 & 255]
        ^ fourth[value >> 24]
    )


@lru_cache(maxsize=256)  # one for each size of chunk; computing one takes 10 ms
def _tables_of_zeros(num_bytes: int) -> Tables:
    """Map from the CRC of a message to that of the message and `num_bytes` zero bytes."""
    power = [POLYNOMIAL, *(1 << bit for bit in range(31))]  # one zero bit
    for _ in range(3):
        power = [_times(power, column) for column in power]
    total = [1 << bit for bit in range(32)]
    while num_bytes:
        if num_bytes & 1:
            total = [_times(power, column) for column in total]
        power = [_times(power, column) for column in power]
        num_bytes >>= 1
    return tuple(
        tuple(_times(total, value << shift) for value in range(256)) for shift in (0, 8, 16, 24)
    )


def _times(matrix: Matrix, vector: int) -> int:
    total = 0
    for column in matrix:
        if vector & 1:
            total ^= column
        vector >>= 1
    return total
