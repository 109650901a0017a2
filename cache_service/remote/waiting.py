"""Reading a local or bucket cache while its build is still running: wait instead of refusing.

A server waits on behalf of its clients, see `cache_service.api`.
"""

from __future__ import annotations

import logging
import time

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import CorruptError, RowsNotBuiltError
from cache_service.format.codecs import Arrays
from cache_service.format.commit import Commit
from cache_service.format.group import Group
from cache_service.rows.reader import Cache
from cache_service.storage import Storage
from cache_service.views.order import epoch_order, positions_of

LOG = logging.getLogger(__name__)

SAY_EVERY_S = 10.0
"""How often is logged what is awaited."""

FIRST_POLL_S = 0.05
LONGEST_POLL_S = 2.0
"""A poll reads one small file or sends one request; a shard takes seconds to minutes."""


class WaitingCache(Cache):
    """A cache that waits up to `wait_s` seconds for each shard that is planned, not recorded."""

    def __init__(
        self, storage: Storage, group: Group, *, wait_s: float, open_shards: int | None
    ) -> None:
        super().__init__(storage, group, open_shards=open_shards)
        self.wait_s = wait_s

    def commit(self, seed: int, shard: int) -> Commit:
        """The checked commit of a shard, once it exists.

        Raises:
            RowsNotBuiltError: the shard is not planned, or not recorded within `wait_s`.
            CorruptError: the commit is damaged, or belongs to another shard.
        """
        began, pause = time.monotonic(), FIRST_POLL_S
        end, say_at = began + self.wait_s, began
        while True:
            try:
                return super().commit(seed, shard)
            except RowsNotBuiltError as error:
                planned = 0 <= seed < self.num_seeds() and 0 <= shard < self.spec.num_shards
                left = end - time.monotonic()
                if not planned:
                    raise
                if left <= 0:
                    raise _timed_out(error, self.wait_s) from None
                if time.monotonic() >= say_at:
                    waited = f"{self.wait_s - left:.0f} s of at most {self.wait_s:.0f} s"
                    LOG.warning("waiting for rows, %s: %s", waited, error.message)
                    say_at += SAY_EVERY_S
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_POLL_S)

    def lookup(
        self, seed: int, samples: NDArray[np.int64], *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of the given samples, in request order.

        The positions are computed from the seed. The stored order, which `Cache.lookup` searches,
        is incomplete while the build runs.

        Raises:
            RowsNotBuiltError: a sample outside the dataset, or not recorded within `wait_s`.
            CorruptError: stored bytes differ from the commit, or the stored order is another one.
        """
        self.check_visited_once()
        count = self.spec.dataset.num_samples
        inside = (samples >= 0) & (samples < count)
        if not inside.all():
            return super().lookup(seed, samples, arrays=arrays)  # which raises the error
        positions = positions_of(epoch_order(count, seed))[samples].astype(np.int64)
        names = tuple(array.name for array in self.arrays) if arrays is None else arrays
        rows = self.gather(seed, positions, arrays=tuple({"sample": None, **dict.fromkeys(names)}))
        if not np.array_equal(rows["sample"], samples):
            raise CorruptError(f"{self.url} is not stored in the order of seed {seed}.")
        return {name: rows[name] for name in names}


def _timed_out(error: RowsNotBuiltError, wait_s: float) -> RowsNotBuiltError:
    return RowsNotBuiltError(
        f"{error.message} Waited {wait_s:g} s for it.",
        hint="Check that the build still runs, or set a longer wait_s.",
    )
