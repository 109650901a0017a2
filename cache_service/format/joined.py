"""The CRC-32C of bytes that are put together, from the CRC-32Cs of the parts. Pure.

A chunk's checksum is known since it was committed. So a range of whole chunks needs no pass over
its bytes, and its checksum says what was committed, whatever has happened to the bytes since.

Source: Mark Adler's crc32_combine in zlib: appending zeros to a message is a linear map on its CRC.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from cache_service.format.canonical import Buffer, crc32c

POLYNOMIAL = 0x82F63B78
"""Castagnoli's, bits reversed."""

Matrix = list[int]
"""32 columns over GF(2), each an integer of 32 bits."""

Tables = tuple[tuple[int, ...], ...]
"""What each value of each of four bytes contributes."""


def joined_crc32c(pieces: Iterable[tuple[Buffer, int | None]]) -> int:
    """CRC-32C of all pieces, one after the other.

    Args:
        pieces: bytes, and their CRC-32C where it is known: those are not read.
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


@lru_cache(maxsize=256)  # one for each size of chunk; making one takes 10 ms
def _tables_of_zeros(num_bytes: int) -> Tables:
    """The map from a message's CRC to that of the message and so many zero bytes."""
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
