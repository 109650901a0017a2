"""Limits of one connection: what uvicorn itself does not bound.

uvicorn waits for ever for the end of a header and, on httptools, keeps as much of one as is sent.
This protocol gives every request a deadline and its header a size, closes connections whose client
does not read its response, and refuses connections above a number. Everything else that a public
address needs is the task of a proxy: see docs/serving.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cache_service.api.http.problems import MEDIA_TYPE, problem_response
from cache_service.api.http.settings import ServiceLimits

MIN_BODY_RATE = 16_384
"""Bytes of a body that extend the deadline of its request by one second."""

REFUSALS = {
    400: ("bad_request", "The request is not valid HTTP/1.1.", "Send HTTP/1.1 to this port."),
    408: ("request_timeout", "The request did not arrive in time.", "Send it without pauses."),
    431: (
        "header_too_large",
        "The request's address and headers are too large.",
        "Send fewer or shorter headers; samples belong into the body.",
    ),
    503: ("busy", "Every connection slot is in use.", "Try again in a second."),
}
"""Status of a refusal -> code, detail and hint of its problem document."""


def limited_protocol(limits: ServiceLimits, on_refusal: Callable[[str], None]) -> Any:
    """Create the protocol factory of a server, for the setting `http` of uvicorn.

    Args:
        limits: `header_timeout_s` is from the first byte of a request (or the start of the
            connection) to its end; a body earns more time, see MIN_BODY_RATE.
        on_refusal: called with the reason of every refusal: a code, `idle` or `stalled`.
    """
    return partial(_LimitedProtocol, limits, on_refusal)


class _LimitedProtocol(HttpToolsProtocol):
    """One connection. A request that arrives in one piece on an open connection needs no timer."""

    def __init__(
        self, limits: ServiceLimits, on_refusal: Callable[[str], None], **uvicorn_arguments: Any
    ) -> None:
        super().__init__(**uvicorn_arguments)
        self.limits = limits
        self.on_refusal = on_refusal
        self._received = self._body_size = 0  # bytes since the last whole request
        self._in_header = False
        self._refusal = 400
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503)
        else:
            self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._deadline_timer)
        self._deadline_timer = None
        _cancel(self._send_timer)
        self._send_timer = None
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn keeps it when a connection broke

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        # What is no body is header, trailer, or framing of chunks.
        if self._received > self.limits.max_header_bytes + 2 * self._body_size:
            self._refuse(431)
        elif self._received and self._deadline_timer is None:
            self._start_deadline()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_header = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_header:  # trailers must not become headers
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._received > self.limits.max_header_bytes:  # a part of that may be body
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self.limits.max_header_bytes:
                self._refusal = 431
                raise _RefusedError
        self._in_header = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._received = self._body_size = 0
        _cancel(self._deadline_timer)
        self._deadline_timer = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_sending()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_sending()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._send_timer)
        self._send_timer = None

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Answer what the parser, or one of the callbacks above, refused."""
        self._refuse(self._refusal)

    def _start_deadline(self) -> None:
        self._deadline = self.loop.time() + self.limits.header_timeout_s
        self._deadline_timer = self.loop.call_at(self._deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        now = self.loop.time()
        if self.flow.read_paused:  # the server is behind, not the client
            self._deadline = now + self.limits.header_timeout_s
        due = self._deadline + self._body_size / MIN_BODY_RATE
        if due > now:
            self._deadline_timer = self.loop.call_at(due, self._check_deadline)
        elif self._received:
            self._refuse(408)
        else:
            self.on_refusal("idle")
            self.transport.close()

    def _refuse(self, status: int) -> None:
        """Send a problem document unless another response has begun, and close the connection."""
        code, detail, hint = REFUSALS[status]
        self.on_refusal(code)
        cycle = self.cycle  # of the last request with a whole header
        begun = cycle is not None and cycle.response_started
        if self._in_header and cycle is not None:
            begun = not cycle.response_complete
        if not begun and not self.pipeline:
            body = problem_response({"path": ""}, status, detail, code=code, hint=hint).body
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: {MEDIA_TYPE}\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()
        self._watch_sending()

    def _watch_sending(self) -> None:
        """Close the connection if its client reads nothing for too long."""
        size = self.transport.get_write_buffer_size()
        if size and self._send_timer is None:
            self._send_timer = self.loop.call_later(
                self.limits.send_timeout_s, self._check_sending, size
            )

    def _check_sending(self, before: int) -> None:
        self._send_timer = None
        if self.transport.get_write_buffer_size() < before:
            self._watch_sending()
        else:
            self.on_refusal("stalled")
            self.transport.abort()


class _RefusedError(httptools.HttpParserError):
    """Stops the parser from inside one of its callbacks."""


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
