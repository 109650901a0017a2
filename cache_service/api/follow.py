"""Awaiting shards that a build has yet to record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

import anyio.to_thread

from cache_service.api.catalog import Catalog
from cache_service.errors import RowsNotBuiltError

FIRST_POLL_S = 0.05
LONGEST_POLL_S = 0.5
"""A look costs one small read per shard; a shard takes seconds to minutes."""

RETRY_AFTER_S = 2


class RowsAwaitedError(RowsNotBuiltError):
    """The rows are planned, and not recorded in time."""

    http_status = 503
    retry_after_s = RETRY_AFTER_S


class Follow(Protocol):
    """Knows when shards are recorded."""

    async def await_shards(
        self, name: str, seed: int, shards: Sequence[int], wait_s: float
    ) -> bool:
        """Wait until the shards of a cache are recorded; False where time is up first."""
        ...


class PollingFollow:
    """Looks for the commits now and then, whoever writes them."""

    def __init__(self, catalog: Catalog, stopping: asyncio.Event) -> None:
        self._catalog = catalog
        self._stopping = stopping

    async def await_shards(
        self, name: str, seed: int, shards: Sequence[int], wait_s: float
    ) -> bool:
        """See `Follow`. Ends early when the server stops."""
        ends, pause = time.monotonic() + wait_s, FIRST_POLL_S
        while not await anyio.to_thread.run_sync(self._recorded, name, seed, tuple(shards)):
            left = ends - time.monotonic()
            if left <= 0 or self._stopping.is_set():
                return False
            try:
                await asyncio.wait_for(self._stopping.wait(), min(pause, left))
            except TimeoutError:
                pause = min(2 * pause, LONGEST_POLL_S)
        return True

    def _recorded(self, name: str, seed: int, shards: tuple[int, ...]) -> bool:
        return self._catalog.open(name).has_commits(seed, shards)
