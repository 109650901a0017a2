"""The next piece of a sequence, fetched by a thread while the last one is used."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from cache_service.errors import KdCacheError, RowsNotBuiltError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Pending(Generic[K, V]):
    """One fetch under way, in the process that started it."""

    def __init__(self, key: K, fetch: Callable[[K], V]) -> None:
        self.key = key
        self.process = os.getpid()
        self._found: V | KdCacheError | None = None
        self._fetch = fetch
        self._thread = threading.Thread(target=self._run, name="kd-cache-ahead", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether another fetch may be started: threads do not survive a fork."""
        return self.process != os.getpid() or not self._thread.is_alive()

    def wait(self) -> V | None:
        """What was found; None where it has to be asked for again. Raises as the fetch did."""
        self._thread.join()
        if isinstance(self._found, RowsNotBuiltError):
            return None  # nobody waits for rows in the background
        if isinstance(self._found, KdCacheError):
            raise self._found
        return self._found

    def _run(self) -> None:
        try:
            self._found = self._fetch(self.key)
        except KdCacheError as refusal:
            self._found = refusal


class ReadAhead(Generic[K, V]):
    """Fetches, with one fetch ahead and the last `kept` pieces remembered. For one thread."""

    def __init__(self, kept: int) -> None:
        self._max_kept = kept
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._pending: _Pending[K, V] | None = None

    def get(self, key: K, fetch: Callable[[K], V]) -> V:
        """The piece: remembered, on its way, or fetched now."""
        found = self._kept.get(key)
        if found is None:
            found = self._on_its_way(key)
        if found is None:
            found = fetch(key)
        if self._max_kept:
            self._kept[key] = found
            self._kept.move_to_end(key)
            while len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
        return found

    def start(self, key: K, fetch: Callable[[K], V]) -> None:
        """Begin to fetch what is likely asked for next, unless something else is under way."""
        if key not in self._kept and (self._pending is None or self._pending.is_over):
            if self._pending is not None and self._is_here(self._pending, key):
                return
            self._pending = _Pending(key, fetch)

    def _on_its_way(self, key: K) -> V | None:
        pending = self._pending
        if pending is None or not self._is_here(pending, key):
            return None
        self._pending = None
        return pending.wait()

    def _is_here(self, pending: _Pending[K, V], key: K) -> bool:
        return pending.key == key and pending.process == os.getpid()
