"""Limits of what runs at a time: requests, event streams, reading threads, bytes of responses.

A request above a limit is answered with 503 at once, from the event loop. So health and metrics
always get through, and a client learns to wait instead of being queued without knowing it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import anyio
import anyio.to_thread
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cache_service.api.http.log import CLIENT_GONE
from cache_service.api.http.problems import problem_response
from cache_service.api.http.settings import ServiceLimits

Params = ParamSpec("Params")
Result = TypeVar("Result")

ALWAYS_ADMITTED = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths without a limit: they are requested most when the service is overloaded."""

STREAM_SUFFIX = "/events"
"""Paths of event streams, which stay open and have a limit of their own."""

RETRY_AFTER_SECONDS = 1

COPIED_BYTES = "copied_bytes"
"""Key in a request's state: memory of a response that is sent in several messages, without the
rows that lie in memory maps."""

UNCOUNTED_BYTES = 64 << 10
"""Responses up to this size fit the buffer of their connection, and are always sent."""


class ConcurrencyLimiter:
    """Counts requests and event streams, and runs reads of storage on a few threads.

    Attributes:
        in_flight: requests between their first and last byte.
        event_streams: open event streams.
        held_bytes: of large responses that their clients have not received yet.
        reading: limiter of the threads that read; health needs none of them.
    """

    def __init__(self, limits: ServiceLimits) -> None:
        self._limits = limits
        self.in_flight = 0
        self.event_streams = 0
        self.held_bytes = 0
        self.reading = anyio.CapacityLimiter(limits.threads)
        # Never full while `reading` has tokens left; without it, anyio's own limit of 40 holds.
        self._threads = anyio.CapacityLimiter(limits.threads)

    def enter(self, *, stream: bool) -> bool:
        """Count a request in, and return False if there are too many."""
        if stream:
            admitted = self.event_streams < self._limits.max_streams
            self.event_streams += admitted
        else:
            admitted = self.in_flight < self._limits.max_inflight
            self.in_flight += admitted
        return admitted

    def leave(self, *, stream: bool) -> None:
        """Count an admitted request out."""
        if stream:
            self.event_streams -= 1
        else:
            self.in_flight -= 1

    def hold(self, num_bytes: int) -> bool:
        """Count the bytes of a large response, and return False if they are too many.

        A response is always admitted if no other is held, however large it is.
        """
        total = self.held_bytes + num_bytes
        admitted = not self.held_bytes or total <= self._limits.max_answer_bytes
        self.held_bytes += admitted * num_bytes
        return admitted

    async def read(
        self,
        request: Request,
        call: Callable[Params, Result],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> Result:
        """Run a call that reads storage on a reading thread.

        Raises:
            HTTPException: the client closed the connection while the call waited for a thread.
        """
        waits = self.reading.available_tokens < 1
        async with self.reading:
            if waits and await request.is_disconnected():
                raise HTTPException(CLIENT_GONE)
            return await anyio.to_thread.run_sync(
                functools.partial(call, *args, **kwargs),
                limiter=self._threads,
                abandon_on_cancel=True,  # stopping the server does not wait for slow storage
            )


class ConcurrencyLimitMiddleware:
    """Answers 503 to requests above the limits, and to large responses above the bytes held.

    The server would copy a response into the buffer of its connection and call the request done:
    clients that read slowly could then fill the memory, whatever the limit on requests in flight.
    So the bytes of a large response are counted until its client has received it.
    """

    def __init__(self, app: ASGIApp, limiter: ConcurrencyLimiter) -> None:
        self.app = app
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count a request in and out."""
        if scope["type"] != "http" or scope["path"] in ALWAYS_ADMITTED:
            await self.app(scope, receive, send)
            return
        stream = scope["path"].endswith(STREAM_SUFFIX)
        if not self._limiter.enter(stream=stream):
            await _busy(scope)(scope, receive, send)
            return
        start: Message | None = None
        held_bytes, refused = 0, False

        async def limited_send(message: Message) -> None:
            """Pass a message on. The first one waits for the second, which tells the size."""
            nonlocal start, held_bytes, refused
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                size = _copied_bytes(scope, message)
                if size > UNCOUNTED_BYTES:
                    refused = not self._limiter.hold(size)
                    held_bytes = 0 if refused else size
                first, start = start, None
                await (_busy(scope)(scope, receive, send) if refused else send(first))
            if refused:
                return
            if message.get("more_body") or not held_bytes:
                await send(message)
                return
            await send({**message, "more_body": True})
            await send({"type": "http.response.body"})  # returns when the client has the bytes

        try:
            await self.app(scope, receive, send if stream else limited_send)
        finally:
            self._limiter.leave(stream=stream)
            self._limiter.held_bytes -= held_bytes


def _copied_bytes(scope: Scope, body: Message) -> int:
    """Memory of a response, by its first body message.

    Objects that are sent piece by piece count as 0, because each piece is awaited before the next
    one is read. Rows that are sent from memory maps do not count either, see COPIED_BYTES.
    """
    size: int | None = scope["state"].get(COPIED_BYTES)
    if size is None:
        return 0 if body.get("more_body") else len(body.get("body", b""))
    return size


def _busy(scope: Scope) -> JSONResponse:
    return problem_response(
        scope,
        503,
        "Every request slot is in use: the service has reached its limit of requests in flight or "
        "of response bytes.",
        hint=f"Ask again in {RETRY_AFTER_SECONDS} s, or with fewer requests at a time.",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


class BodyLimitMiddleware:
    """Answers 413 to a body that is too long. FastAPI's own limit answers in plain text."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_bytes
        self._detail = f"the body is longer than {max_bytes} bytes."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse by the declared length, or count the bytes that arrive."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # The rest of a refused body is not read, so the connection cannot be used again.
        close = {"Connection": "close"}
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > self._max_bytes:
            refusal = problem_response(
                scope,
                413,
                self._detail,
                hint="Split the request into several ones.",
                headers=close,
            )
            await refusal(scope, receive, send)
            return
        received = 0

        async def counting_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, self._detail, close)
            return message

        await self.app(scope, counting_receive, send)
