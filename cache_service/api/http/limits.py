"""What runs at a time: requests in flight, bytes of answers, event streams, threads that read.

A full house answers 503 at once, from the event loop, so that health and metrics always get through
and a client learns to wait instead of queueing unseen.

How long the body of a request may be. It is cut off where it is read, whatever it declares.
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

Params = ParamSpec("Params")
Result = TypeVar("Result")

ALWAYS_ADMITTED = frozenset({"/healthz", "/readyz", "/metrics"})
"""What tells whether the service is well is asked most when it is not."""

STREAM_SUFFIX = "/events"
"""Routes that stay open: they have places of their own."""

RETRY_AFTER_SECONDS = 1

COPIED_BYTES = "copied_bytes"
"""In the state of a request: memory that an answer of several messages takes, rows in maps not."""

UNCOUNTED_BYTES = 64 << 10
"""An answer up to here fits the buffer of its connection: it is sent whatever else is held."""


class Gate:
    """Places for requests and event streams, and the threads that read rows.

    Attributes:
        in_flight: requests now between their first and last byte.
        event_streams: streams now open.
        held_bytes: of large answers that their clients have not taken yet.
        reading: limiter of the threads that read; health needs none of them.
    """

    def __init__(
        self,
        *,
        max_in_flight: int,
        max_event_streams: int,
        reading_threads: int,
        max_held_bytes: int = 256 << 20,
    ) -> None:
        self._max_in_flight = max_in_flight
        self._max_event_streams = max_event_streams
        self._max_held_bytes = max_held_bytes
        self.in_flight = 0
        self.event_streams = 0
        self.held_bytes = 0
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

    def hold(self, num_bytes: int) -> bool:
        """Account for a large answer; whether there was room. One alone is always let through."""
        admitted = not self.held_bytes or self.held_bytes + num_bytes <= self._max_held_bytes
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
        answer = _Answer(self.gate, scope, receive, send)
        try:
            await self.app(scope, receive, send if stream else answer.send)
        finally:
            self.gate.leave(stream=stream)
            self.gate.held_bytes -= answer.held_bytes


class _Answer:
    """One answer on its way out: a large one is held until its client has taken it, or refused.

    The server would take it at once into the buffer of the connection, and call the request done:
    clients that read slowly could then fill the memory, whatever the bound on requests in flight.
    Objects that are read piece by piece are not counted: a piece is awaited before the next one.
    Nor are rows that go out of the maps as they lie.
    """

    __slots__ = ("_gate", "_receive", "_refused", "_scope", "_send", "_start", "held_bytes")

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self._gate = gate
        self._scope = scope
        self._receive = receive
        self._send = send
        self._start: Message | None = None
        self._refused = False
        self.held_bytes = 0

    async def send(self, message: Message) -> None:
        """Hand a message on; the first one with the second."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        start, self._start = self._start, None
        if start is not None:
            size = self._scope["state"].get(COPIED_BYTES)
            if size is None:
                size = 0 if message.get("more_body") else len(message.get("body", b""))
            if size > UNCOUNTED_BYTES:
                if not self._gate.hold(size):
                    self._refused = True
                    await _busy(self._scope)(self._scope, self._receive, self._send)
                    return
                self.held_bytes = size
            await self._send(start)
        if self._refused:
            return
        if message.get("more_body") or not self.held_bytes:
            await self._send(message)
            return
        await self._send({**message, "more_body": True})
        await self._send({"type": "http.response.body"})  # returns when the client has taken it


def _busy(scope: Scope) -> JSONResponse:
    return problem_response(
        scope,
        503,
        "Every place is taken: the service holds as many requests, or bytes of answers, as it may.",
        hint=f"Ask again in {RETRY_AFTER_SECONDS} s, or with fewer requests at a time.",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


class BodyLimitMiddleware:
    """Answers 413 to a body that is too long. FastAPI's own limit answers in plain text."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse by what is declared, or count what comes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > self._max_bytes:
            refusal = problem_response(
                scope, 413, self._detail(), hint="Ask in several requests.", headers=_CLOSE
            )
            await refusal(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise HTTPException(413, self._detail(), _CLOSE)
            return message

        await self.app(scope, counted, send)

    def _detail(self) -> str:
        return f"the body is longer than {self._max_bytes} bytes."


_CLOSE = {"Connection": "close"}
"""The rest of the body is not read, so the connection cannot be used again."""
