"""The order in which shards are taken, which may be changed while a build runs."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator

from cache_service.recording.jobs import Shard


class ShardOrder:
    """As planned, but for shards that somebody waits for: those come first, first asked first.

    The bytes of a shard do not depend on its turn: teacher batches never cross a shard's edge.
    Shards are moved from another thread, also before `through` is asked for the first one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: deque[Shard] = deque()

    def front(self, shard: Shard) -> None:
        """Take this one next, unless it is taken already."""
        with self._lock:
            self._wanted.append(shard)

    def through(self, shards: Iterable[Shard]) -> Iterator[Shard]:
        """Each of the shards once. Which is next is decided when it is asked for."""
        left = OrderedDict.fromkeys(shards)
        while left:
            shard = self._wanted_of(left) or next(iter(left))
            del left[shard]
            yield shard

    def _wanted_of(self, left: OrderedDict[Shard, None]) -> Shard | None:
        with self._lock:
            while self._wanted:
                shard = self._wanted.popleft()
                if shard in left:
                    return shard
        return None
