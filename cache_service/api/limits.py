"""What runs at a time: requests in flight, event streams, and threads that read.

A full house answers 503 at once, from the event loop, so that health and metrics always get through
and a client learns to wait instead of queueing unseen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import anyio
import anyio.to_thread
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from cache_service.api.observe import CLIENT_GONE
from cache_service.api.problems import problem_response

Params = ParamSpec("Params")
Result = TypeVar("Result")

ALWAYS_ADMITTED = frozenset({"/healthz", "/readyz", "/metrics"})
"""What tells whether the service is well is asked most when it is not."""

STREAM_SUFFIX = "/events"
"""Routes that stay open: they have places of their own."""

RETRY_AFTER_SECONDS = 1


class Gate:
    """Places for requests and event streams, and the threads that read rows.

    Attributes:
        in_flight: requests now between their first and last byte.
        event_streams: streams now open.
        reading: limiter of the threads that read; health needs none of them.
    """

    def __init__(self, *, max_in_flight: int, max_event_streams: int, reading_threads: int) -> None:
        self._max_in_flight = max_in_flight
        self._max_event_streams = max_event_streams
        self.in_flight = 0
        self.event_streams = 0
        self.reading = anyio.CapacityLimiter(reading_threads)
        # Never full where `reading` has room: it keeps anyio's own 40 tokens out of this.
        self._threads = anyio.CapacityLimiter(reading_threads)

    def enter(self, *, stream: bool) -> bool:
        """Take a place; whether there was one."""
        if stream:
            admitted = self.event_streams < self._max_event_streams
            self.event_streams += admitted
        else:
            admitted = self.in_flight < self._max_in_flight
            self.in_flight += admitted
        return admitted

    def leave(self, *, stream: bool) -> None:
        """Give the place back."""
        if stream:
            self.event_streams -= 1
        else:
            self.in_flight -= 1

    async def read(
        self,
        request: Request,
        call: Callable[Params, Result],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> Result:
        """Run a call that reads storage on a reading thread.

        Raises:
            HTTPException: the client went away while the call waited for a thread.
        """
        waits = self.reading.available_tokens < 1
        async with self.reading:
            if waits and await request.is_disconnected():
                raise HTTPException(CLIENT_GONE)
            return await anyio.to_thread.run_sync(
                functools.partial(call, *args, **kwargs),
                limiter=self._threads,
                abandon_on_cancel=True,  # a stop does not wait for slow storage
            )


class GateMiddleware:
    """Lets a request in where there is a place, and answers 503 where there is none."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the request in and out."""
        if scope["type"] != "http" or scope["path"] in ALWAYS_ADMITTED:
            await self.app(scope, receive, send)
            return
        stream = scope["path"].endswith(STREAM_SUFFIX)
        if not self.gate.enter(stream=stream):
            await _busy(scope)(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:
            self.gate.leave(stream=stream)


def _busy(scope: Scope) -> JSONResponse:
    return problem_response(
        scope,
        503,
        "Every place is taken: the service answers as many requests as it may.",
        hint=f"Ask again in {RETRY_AFTER_SECONDS} s, or with fewer requests at a time.",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )
