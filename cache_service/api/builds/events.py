"""The changes of one build as server-sent events."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import ParamSpec, Protocol, TypeVar

import anyio
import anyio.to_thread
from fastapi.sse import ServerSentEvent

from cache_service.api.builds.errors import NoSuchBuildError
from cache_service.api.builds.supervisor import Builds

Params = ParamSpec("Params")
Result = TypeVar("Result")

POLL_S = 0.3
"""How often a stream looks for a change. By asking the queue, which knows other servers' builds."""

RECONNECT_MS = 2000
"""What a browser waits before it comes back to a server that was restarted."""


class Stopping(Protocol):
    """An event that ends streams when the server stops: asyncio's or anyio's."""

    def is_set(self) -> bool:
        """Whether the server stops."""
        ...

    async def wait(self) -> object:
        """Until it does."""
        ...


async def on_thread(
    builds: Builds, call: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs
) -> Result:
    """Ask the queue without holding up the event loop, on threads that no reader needs."""
    return await anyio.to_thread.run_sync(
        functools.partial(call, *args, **kwargs), limiter=builds.threads
    )


async def build_events(
    builds: Builds, build_id: str, stopping: Stopping
) -> AsyncIterator[ServerSentEvent]:
    """The build as it is, then each change, until it is final or the server stops."""
    seen = 0
    with suppress(NoSuchBuildError):  # forgotten meanwhile
        while not stopping.is_set():
            build = await on_thread(builds, builds.get, build_id)
            if build.version != seen:
                seen = build.version
                yield ServerSentEvent(event="build", id=str(seen), retry=RECONNECT_MS, data=build)
            if build.is_final:
                return
            with anyio.move_on_after(POLL_S):
                await stopping.wait()
