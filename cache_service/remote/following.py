"""A cache in a folder or a bucket whose build is still under way: rows are awaited, not refused."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import CorruptError, RowsNotBuiltError
from cache_service.format.codecs import Arrays
from cache_service.format.commit import Commit
from cache_service.format.group import Group
from cache_service.reader import Cache
from cache_service.storage import Storage
from cache_service.views.order import epoch_order, positions_of

FIRST_POLL_S = 0.05
LONGEST_POLL_S = 2.0
"""A look costs one read of a small file, or one request; a shard takes seconds to minutes."""


class FollowingCache(Cache):
    """A cache that waits up to `wait_s` for each shard that is planned and not recorded."""

    def __init__(self, storage: Storage, group: Group, *, wait_s: float, open_shards: int) -> None:
        super().__init__(storage, group, open_shards=open_shards)
        self.wait_s = wait_s

    def commit(self, seed: int, shard: int) -> Commit:
        """The checked commit of a shard, when it is there.

        Raises:
            RowsNotBuiltError: not planned, or not there in time.
            CorruptError: it is damaged, or another shard's.
        """
        ends, pause = time.monotonic() + self.wait_s, FIRST_POLL_S
        while True:
            try:
                return super().commit(seed, shard)
            except RowsNotBuiltError as refusal:
                planned = 0 <= seed < self.num_seeds() and 0 <= shard < self.spec.num_shards
                left = ends - time.monotonic()
                if not planned or left <= 0:
                    raise _late(refusal, self.wait_s) if planned else refusal from None
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_POLL_S)

    def lookup(
        self, seed: int, samples: NDArray[np.int64], *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of the given samples, in request order.

        Where they are follows from the seed: what is recorded so far need not be searched.

        Raises:
            RowsNotBuiltError: a sample outside the dataset, or not there in time.
            CorruptError: stored bytes are not those committed, or the order is another one.
        """
        count = self.spec.dataset.num_samples
        inside = (samples >= 0) & (samples < count)
        if not inside.all():
            return super().lookup(seed, samples, arrays=arrays)  # which refuses
        positions = positions_of(epoch_order(count, seed))[samples].astype(np.int64)
        names = tuple(array.name for array in self.arrays) if arrays is None else arrays
        rows = self.gather(seed, positions, arrays=tuple({"sample": None, **dict.fromkeys(names)}))
        if not np.array_equal(rows["sample"], samples):
            raise CorruptError(f"{self.url} is not stored in the order of seed {seed}.")
        return {name: rows[name] for name in names}


def _late(refusal: RowsNotBuiltError, wait_s: float) -> RowsNotBuiltError:
    return RowsNotBuiltError(
        f"{refusal.message} They were awaited for {wait_s:g} s.",
        hint="Look whether the build still runs, or set a longer wait_s.",
    )
