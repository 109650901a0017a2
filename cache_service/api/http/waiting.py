"""Waiting for shards that are planned and not recorded yet."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import anyio.to_thread
from fastapi import Request
from starlette.exceptions import HTTPException

from cache_service.api.http.catalog import Catalog
from cache_service.api.http.log import CLIENT_GONE
from cache_service.api.http.settings import ServiceLimits
from cache_service.errors import KdCacheError, RowsNotBuiltError

FIRST_POLL_S = 0.05
LONGEST_POLL_S = 0.5
"""A poll costs one small read per shard; recording a shard takes seconds to minutes."""

RETRY_AFTER_S = 2

log = logging.getLogger("kdcache.waiting")


class RowsAwaitedError(RowsNotBuiltError):
    """The rows are planned, but were not recorded before the time was up."""

    http_status = 503
    retry_after_s = RETRY_AFTER_S


class ShardWaiter:
    """Polls for the commits of shards, whichever process writes them.

    Args:
        stopping: ends every wait when it is set.
        limits: `wait_max_s` of one request; more requests than `max_waiting` do not wait at all.

    Attributes:
        prioritize: moves shards (cache name, seed, numbers) to the front of the build queue; None
            if the server runs no builds.
        waiting: requests that wait now.
    """

    def __init__(
        self,
        catalog: Catalog,
        stopping: asyncio.Event,
        limits: ServiceLimits,
    ) -> None:
        self._catalog = catalog
        self._stopping = stopping
        self._limits = limits
        self.prioritize: Callable[[str, int, Sequence[int]], object] | None = None
        self.waiting = 0

    async def wait_while_connected(
        self, request: Request, name: str, seed: int, shards: Sequence[int], wait_s: float
    ) -> bool:
        """Wait until the shards are recorded, and return False if the time is up first.

        Raises:
            HTTPException: the client closed the connection.
        """
        limits = self._limits
        seconds = min(wait_s, limits.wait_max_s) if self.waiting < limits.max_waiting else 0.0
        self.waiting += 1
        recorded = asyncio.ensure_future(self.wait(name, seed, shards, seconds))
        disconnected = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({recorded, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            if not recorded.done():
                raise HTTPException(CLIENT_GONE)
            return recorded.result()
        finally:
            self.waiting -= 1
            recorded.cancel()
            disconnected.cancel()

    async def wait(self, name: str, seed: int, shards: Sequence[int], wait_s: float) -> bool:
        """Wait until the shards are recorded, and return False if time or server end first.

        The shards are prioritized even if `wait_s` is 0: such a client comes back for them.
        """
        if self.prioritize is not None:
            try:
                await anyio.to_thread.run_sync(self.prioritize, name, seed, shards)
            except KdCacheError as error:  # a broken queue must not cost anybody rows
                log.warning("shards of %s could not be prioritized: %s", name, error)
        deadline, pause = time.monotonic() + wait_s, FIRST_POLL_S
        while not await anyio.to_thread.run_sync(self._are_recorded, name, seed, tuple(shards)):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or self._stopping.is_set():
                return False
            try:
                await asyncio.wait_for(self._stopping.wait(), min(pause, remaining))
            except TimeoutError:
                pause = min(2 * pause, LONGEST_POLL_S)
        return True

    def _are_recorded(self, name: str, seed: int, shards: tuple[int, ...]) -> bool:
        return self._catalog.open(name).has_commits(seed, shards)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
