"""Damage that was found while reading, by cache, until the cache changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from cachetools import LRUCache

from cache_service.errors import CorruptError

MAX_CACHES = 1000
"""Caches whose damage is remembered: those in which some was found last."""


class FoundDamage(NamedTuple):
    """The latest damage found in a cache. `found_s` is the Unix time in seconds."""

    message: str
    hint: str
    found_s: float


class DamageLog:
    """What reading has found damaged. Nothing is searched for here: `kd-cache verify` does that.

    Damage is forgotten when its cache changes: a repair changes the commits, and so does recording
    more. Damage that is still there is found again by the next read. Safe to use from several
    threads.
    """

    def __init__(self, changed_s: Callable[[str], float | None]) -> None:
        """Begin with no damage.

        Args:
            changed_s: returns when a cache changed last, Unix time in seconds; None if that is not
                known, and its damage is then remembered.
        """
        self._changed_s = changed_s
        self._lock = threading.Lock()
        self._found: LRUCache[str, FoundDamage] = LRUCache(MAX_CACHES)

    def note(self, cache: str, damage: CorruptError) -> None:
        """Remember damage in a cache, by its name."""
        with self._lock:
            self._found[cache] = FoundDamage(damage.message, damage.hint, time.time())

    def of(self, cache: str) -> FoundDamage | None:
        """The damage found in a cache since it changed last; None if there is none."""
        with self._lock:
            found = self._found.get(cache)
        if found is None:
            return None
        changed_s = self._changed_s(cache)
        if changed_s is None or changed_s <= found.found_s:
            return found
        with self._lock:
            self._found.pop(cache, None)
        return None

    def count(self) -> int:
        """Number of caches with damage."""
        with self._lock:
            names = list(self._found)
        return sum(self.of(name) is not None for name in names)
