"""Rows as bytes in memory: blank, typed, and out of many mapped shards by one index.

A lookup of 256 rows meets every shard of its seed, and an index for each of them costs more than
the copying. Mapped files are memory like any other, so the bytes from the first of them to the end
of the last are looked at as one array, of which only checked rows are ever touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

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


class NotAtHandError(Exception):
    """The rows cannot be had without touching storage. Internal to those who ask `at_hand`."""


class CheckedMap(NamedTuple):
    """One array of one shard in memory, every chunk of it checked.

    Attributes:
        mapped: its bytes. Whoever has this tuple keeps them mapped.
        address: of the first one.
        stride: bytes from one chunk to the next.
        row_bytes: of one row.
    """

    mapped: NDArray[np.uint8]
    address: int
    stride: int
    row_bytes: int


def gather_mapped(
    maps: Sequence[CheckedMap],
    which_B: NDArray[np.int64],
    chunks_B: NDArray[np.int64],
    inside_B: NDArray[np.int64],
) -> Rows:
    """Row `inside_B` of chunk `chunks_B` of map `which_B`, for each of B rows.

    Args:
        maps: of one array of one cache, so of the same row and chunk size.
        which_B: index into `maps`.
        chunks_B, inside_B: below those that a map has.
    """
    stride, row_bytes = maps[0].stride, maps[0].row_bytes
    addresses = [each.address for each in maps]
    first = min(addresses)
    last = max(each.address + len(each.mapped) for each in maps)
    offsets_B = chunks_B * stride
    offsets_B += inside_B * row_bytes
    if len(maps) > 1:
        offsets_B += np.array([address - first for address in addresses], np.int64)[which_B]
    rows_B: Rows = _memory(first, last - first, row_bytes)[offsets_B]
    return rows_B


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


def _memory(address: int, num_bytes: int, row_bytes: int) -> Rows:
    """Memory from an address on, as rows that begin at any byte. Nothing is read by looking."""
    return np.asarray(_Window(address, num_bytes, row_bytes))
