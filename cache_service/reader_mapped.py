"""What is mapped and checked of one seed, as one array from its first byte to its last.

A lookup of 256 rows meets every shard of its seed, and an index for each of them costs more than
the copying. Mapped files are memory like any other, so one index over the address range of all of
them gathers the rows, of which only checked ones are ever touched.

Shape letters: B rows, C chunks of a seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cache_service.reader_memory import CheckedMap, Rows, memory_rows

ShardMaps: TypeAlias = Mapping[str, CheckedMap]
"""The arrays of one shard, every chunk of them checked, by name."""

UNKNOWN = -1


class _Column(NamedTuple):
    """One array of a seed.

    Attributes:
        rows: every byte of the address range, as the first one of a row.
        begins_C: where each chunk begins in it, in bytes; UNKNOWN where it is not mapped.
        row_bytes: of one row.
    """

    rows: Rows
    begins_C: NDArray[np.int64]
    row_bytes: int


class MappedSeed:
    """Arrays of one seed in memory. It does not change, so threads read it without a lock.

    Attributes:
        shards: what it is made of. Whoever has this object keeps them mapped.
        was_read: since somebody last set it to False.
    """

    def __init__(
        self, shards: Mapping[int, ShardMaps], *, num_shards: int, shard_chunks: int
    ) -> None:
        """Look at shards, by number; all of them have the same arrays, of the same row size.

        Args:
            shards: one at least.
            num_shards: of the seed, mapped or not.
            shard_chunks: chunks of a whole shard.
        """
        self.shards = dict(shards)
        self.was_read = False
        self._columns = {
            name: _column(
                {number: maps[name] for number, maps in shards.items()},
                num_shards * shard_chunks,
                shard_chunks,
            )
            for name in next(iter(shards.values()))
        }
        first = next(iter(self._columns.values()))
        self._unknown_C = first.begins_C == UNKNOWN
        self._is_whole = not self._unknown_C.any()

    def gather(
        self, chunks_B: NDArray[np.int64], inside_B: NDArray[np.int64]
    ) -> dict[str, Rows] | None:
        """Rows by chunk of the seed and place in it; None where a chunk is not among them.

        Raises:
            IndexError: the seed has no such chunk.
        """
        if not self._is_whole and self._unknown_C[chunks_B].any():
            return None
        self.was_read = True
        return {
            name: rows[begins_C.take(chunks_B) + inside_B * row_bytes]
            for name, (rows, begins_C, row_bytes) in self._columns.items()
        }


def _column(maps: Mapping[int, CheckedMap], num_chunks: int, shard_chunks: int) -> _Column:
    begins_C = np.full(num_chunks, UNKNOWN, np.int64)
    first = min(each.address for each in maps.values())
    last = max(each.address + len(each.mapped) for each in maps.values())
    for number, each in maps.items():
        chunk = number * shard_chunks
        begins_C[chunk : chunk + each.num_chunks] = (
            each.address - first + each.stride * np.arange(each.num_chunks)
        )
    row_bytes = next(iter(maps.values())).row_bytes
    return _Column(memory_rows(first, last - first, row_bytes), begins_C, row_bytes)
