"""Rows as bytes in memory: blank, typed, and seen from any address on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cache_service.format.codecs import Arrays
from cache_service.format.layout import RowArray

Rows: TypeAlias = NDArray[np.void]
"""Rows of one array as they are stored, one element a row."""

Piece: TypeAlias = tuple[memoryview, int | None]
"""Rows where they lie, and their CRC-32C where it was committed: that of a whole chunk."""


def blank_rows(
    known: Iterable[RowArray], num_rows: int, names: tuple[str, ...] | None
) -> dict[str, Rows]:
    """Memory for rows of the arrays named (all by default), in the order of the names."""
    sizes = {array.name: array.row_bytes for array in known}
    chosen = tuple(sizes) if names is None else names
    return {name: np.empty(num_rows, f"V{sizes[name]}") for name in chosen}


def typed_rows(known: Iterable[RowArray], rows: dict[str, Rows]) -> Arrays:
    """The same bytes as numbers, each array [B, ...]."""
    arrays = {array.name: array for array in known}
    typed: Arrays = {}
    for name, values in rows.items():
        dtype = np.dtype(arrays[name].dtype).newbyteorder("<")
        typed[name] = values.view(dtype).reshape(len(values), *arrays[name].row_shape)
    return typed


def first_outside(numbers: NDArray[np.signedinteger[Any]], count: int) -> int | None:
    """The first of some numbers that is not in [0, count); None if all are."""
    unsigned = numbers.astype(np.uint64)  # one below 0 wraps to far above, so one bound is enough
    if not len(unsigned) or unsigned.max() < count:
        return None
    return int(numbers[np.argmax(unsigned >= count)])


class NotAtHandError(Exception):
    """The rows cannot be had without touching storage. Internal to those who ask `at_hand`."""


class CheckedMap(NamedTuple):
    """One array of one shard in memory, every chunk of it checked.

    Attributes:
        mapped: its bytes. Whoever has this tuple keeps them mapped.
        address: of the first one.
        num_chunks: that it has.
        stride: bytes from one chunk to the next.
        row_bytes: of one row.
    """

    mapped: NDArray[np.uint8]
    address: int
    num_chunks: int
    stride: int
    row_bytes: int


class _Window:
    """What numpy asks to see memory as an array."""

    def __init__(self, address: int, num_bytes: int, row_bytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "typestr": f"|V{row_bytes}",
            "shape": (num_bytes - row_bytes + 1,),
            "strides": (1,),
        }


def memory_rows(address: int, num_bytes: int, row_bytes: int) -> Rows:
    """Memory from an address on, as rows that begin at any byte. Nothing is read by looking.

    The caller keeps the memory where it is for as long as it indexes this.
    """
    return np.asarray(_Window(address, num_bytes, row_bytes))
