"""The shards of a cache that are open, the least recently used of them closed for others.

Shape letters: B rows.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cache_service.format.layout import row_arrays
from cache_service.format.spec import CacheSpec
from cache_service.reader_mapped import MappedSeed
from cache_service.reader_memory import NotAtHandError, Rows, blank_rows
from cache_service.reader_shard import ShardRows

KEPT_SEEDS = 8
"""Seeds, each with one choice of arrays, that are looked at as a whole."""

Key: TypeAlias = tuple[int, tuple[str, ...]]

Opener: TypeAlias = Callable[[int, int], ShardRows]
"""Opens a shard by seed and number."""


class OpenShards:
    """Shards by seed and number, and rows gathered across those of a seed. Threads may share it."""

    def __init__(self, spec: CacheSpec, *, most: int) -> None:
        """Open nothing yet, and later `most` shards at a time."""
        self._spec = spec
        self._arrays = row_arrays(spec)
        self._most = most
        self._shards: OrderedDict[tuple[int, int], ShardRows] = OrderedDict()
        self._mapped: OrderedDict[Key, MappedSeed] = OrderedDict()
        self._lock = threading.Lock()

    def shard(self, seed: int, number: int, open_shard: Opener | None) -> ShardRows:
        """One shard, opened if it is not.

        Raises:
            NotAtHandError: it is not open, and there is nothing to open it with.
        """
        with self._lock:
            rows = self._shards.get((seed, number))
            if rows is not None:
                self._shards.move_to_end((seed, number))
                return rows
        if open_shard is None:
            raise NotAtHandError
        # Opened outside of the lock: two threads may both do it, and the later one's is kept.
        rows = open_shard(seed, number)
        with self._lock:
            self._shards[seed, number] = rows
            if len(self._shards) > self._most:
                self._make_room()
        return rows

    def if_open(self, seed: int, number: int) -> ShardRows | None:
        """The shard, or None where it is not open."""
        with self._lock:
            return self._shards.get((seed, number))

    def gather(
        self,
        seed: int,
        positions_B: NDArray[np.int64],
        names: tuple[str, ...],
        open_shard: Opener | None,
    ) -> dict[str, Rows]:
        """Rows of recorded positions, all of them in the epoch.

        Raises:
            NotAtHandError: storage would have to be touched, and `open_shard` is None.
        """
        places = np.divmod(positions_B, self._spec.layout.chunk_rows)
        mapped = self._mapped.get((seed, names))
        rows = None if mapped is None else mapped.gather(*places)
        if rows is None:
            return self._gather_by_shard(seed, positions_B, names, open_shard)
        return rows

    def _gather_by_shard(
        self,
        seed: int,
        positions_B: NDArray[np.int64],
        names: tuple[str, ...],
        open_shard: Opener | None,
    ) -> dict[str, Rows]:
        """The plain way; the shards that it leaves checked throughout are one array next time."""
        shards_B, local_B = np.divmod(positions_B, self._spec.layout.shard_rows)
        met = {
            number: self.shard(seed, number, open_shard) for number in np.unique(shards_B).tolist()
        }
        rows = blank_rows(self._arrays, len(positions_B), names)
        for number, shard in met.items():
            where = np.flatnonzero(shards_B == number)
            shard.gather_into(local_B[where], rows, where, at_hand=open_shard is None)
        self._look_over(seed, names, met)
        return rows

    def _look_over(self, seed: int, names: tuple[str, ...], met: Mapping[int, ShardRows]) -> None:
        known = self._mapped.get((seed, names))
        maps = dict(known.shards) if known is not None else {}
        before = len(maps)
        for number, shard in met.items():
            found = None if number in maps else shard.checked_maps(names)
            if found:
                maps[number] = found
        if len(maps) == before:
            return
        layout = self._spec.layout
        mapped = MappedSeed(
            maps,
            num_shards=self._spec.num_shards,
            shard_chunks=layout.shard_rows // layout.chunk_rows,
        )
        with self._lock:
            if not all((seed, number) in self._shards for number in maps):
                return  # one was closed meanwhile, and must not be kept by this
            self._mapped[seed, names] = mapped
            while len(self._mapped) > KEPT_SEEDS:
                self._mapped.popitem(last=False)

    def _make_room(self) -> None:
        """Close the least recently used shards: those read through a whole seed were used, too."""
        for (seed, _), mapped in self._mapped.items():
            if mapped.was_read:
                mapped.was_read = False
                for number in mapped.shards:
                    self._shards.move_to_end((seed, number))
        while len(self._shards) > self._most:
            seed, number = self._shards.popitem(last=False)[0]
            for key, mapped in list(self._mapped.items()):
                if key[0] == seed and number in mapped.shards:
                    del self._mapped[key]
