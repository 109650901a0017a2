"""Reading rows for a request: on a thread, and again when a running build has recorded them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException

from cache_service.api.catalog import Served
from cache_service.api.follow import RowsAwaitedError
from cache_service.api.observe import CLIENT_GONE
from cache_service.api.service import Service
from cache_service.errors import RowsNotBuiltError
from cache_service.reader_memory import NotAtHandError

Result = TypeVar("Result")


class Need(NamedTuple):
    """What a request reads.

    Attributes:
        name: of the cache.
        seed: of the rows.
        shards_of: the shards that the rows lie in, worked out without reading any.
        wait_s: how long the client waits for them, in seconds.
    """

    name: str
    seed: int
    shards_of: Callable[[Served], Sequence[int]]
    wait_s: float


async def read_rows(
    service: Service, request: Request, need: Need, read: Callable[[Served, bool], Result]
) -> Result:
    """What `read` makes of the cache, as soon as the rows that it needs are recorded.

    It is tried here first with what is at hand: mapped and checked. That is a copy of microseconds,
    where a thread costs more than the copy. What touches storage goes to a thread.

    Args:
        service: whose caches.
        request: whose client may go away.
        need: which rows.
        read: is given the cache, and whether only what is at hand may be used; raises
            NotAtHandError if that is not enough.

    Raises:
        NotACacheError: there is no such cache.
        RowsNotBuiltError: nobody planned the rows.
        RowsAwaitedError: they are planned, and were not recorded in time.
        CorruptError: stored bytes are not those committed.
    """

    def first() -> Result:
        return read(service.catalog.open(need.name), False)

    with suppress(NotAtHandError):
        return read(service.catalog.at_hand(need.name), True)
    try:
        return await service.gate.read(request, first)
    except RowsNotBuiltError as refusal:
        shards = await service.gate.read(request, _planned, service, need, refusal)
        if not await _recorded(service, request, need, shards):
            raise RowsAwaitedError(
                refusal.message, hint="They are planned: ask again, or let the request wait."
            ) from refusal
    return await service.gate.read(request, first)


def _planned(service: Service, need: Need, refusal: RowsNotBuiltError) -> list[int]:
    """The shards to wait for; the refusal again where nobody planned them."""
    served = service.catalog.open(need.name)
    shards = list(need.shards_of(served))
    inside = all(0 <= shard < served.cache.spec.num_shards for shard in shards)
    if not shards or not inside or need.seed >= served.cache.num_seeds():
        raise refusal
    return shards


async def _recorded(service: Service, request: Request, need: Need, shards: Sequence[int]) -> bool:
    """Wait for the shards, as long as the client is there."""
    limits = service.config.limits
    wait_s = min(need.wait_s, limits.wait_max_s)
    if service.waiting >= limits.max_waiting:
        wait_s = 0.0
    service.waiting += 1
    waits = asyncio.ensure_future(service.follow.await_shards(need.name, need.seed, shards, wait_s))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({waits, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not waits.done():
            raise HTTPException(CLIENT_GONE)
        return waits.result()
    finally:
        service.waiting -= 1
        waits.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
