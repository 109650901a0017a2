"""The connection guard: what a client owes the server, it owes within a time and a size.

uvicorn waits for ever for the end of a header and, on httptools, keeps as much of one as is sent.
This protocol bounds both, and bodies that drip, answers that nobody takes, and open connections.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

LINGER_SECONDS = 1.0
"""An answer that came before the end of the request is given this long to be read."""

MAX_PIPELINED = 32
"""Requests sent ahead of their answers on one connection."""

REFUSALS = {
    400: ("bad_request", "The request is not HTTP/1.1.", "Speak HTTP/1.1 to this port."),
    408: ("request_timeout", "The request did not arrive in time.", "Send it in one go."),
    431: (
        "header_too_large",
        "The request's address and headers are too large.",
        "Send fewer or shorter headers; samples belong in the body.",
    ),
    503: ("busy", "Every connection is in use.", "Try again in a second."),
}
"""Status of a refusal -> code, detail and hint of its problem document."""


def _count_nothing(_reason: str) -> None:
    """Stand in where nobody counts refusals."""


class GuardLimits(NamedTuple):
    """Bounds of one connection.

    Attributes:
        header_seconds: from the first byte (or the connection) to the end of the header.
        header_bytes: of the address and all headers.
        min_body_rate: bytes of a body that earn its request one second more.
        send_seconds: in which a client must take at least one byte of a waiting answer.
        connections: open at a time; above it, the one that has waited longest goes.
        on_refusal: is told the reason of every refusal: a code, or `idle`, `stalled`, `crowded`.
    """

    header_seconds: float = 5.0
    header_bytes: int = 32_768
    min_body_rate: int = 16_384
    send_seconds: float = 30.0
    connections: int = 1000
    on_refusal: Callable[[str], None] = _count_nothing


def guarded(limits: GuardLimits) -> type[HttpToolsProtocol]:
    """The protocol class of a server with these limits; its connections know each other."""
    return type("GuardedProtocol", (_GuardedProtocol,), {"limits": limits, "waiting": {}})


class _GuardedProtocol(HttpToolsProtocol):
    """A request is owed from its first byte, or from the connection, until its body is complete.

    One timer a connection is enough, and a request that arrives in one piece needs none.
    """

    limits: ClassVar[GuardLimits]
    waiting: ClassVar[dict[_GuardedProtocol, None]]
    """Connections without a whole header, longest waiting first."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._in_message = False
        self._in_header = False
        self._deadline = 0.0
        self._piece_size = 0
        self._body_size = 0
        self._overhead = 0
        self._status = 400
        self._owed_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self.waiting[self] = None
        self._start_clock()
        if len(self.connections) > self.limits.connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self.waiting.pop(self, None)
        for timer in (self._owed_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        self._owed_timer = self._send_timer = None
        super().connection_lost(exc)
        # uvicorn keeps this timer of a connection that broke; it would hold everything for seconds.
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        body_before, self._piece_size = self._body_size, len(data)
        if self._owed_timer is None:
            self._deadline = self.loop.time() + self.limits.header_seconds
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._overhead += len(data) - (self._body_size - body_before)
        if self._in_header:
            if self._overhead > self.limits.header_bytes:
                self._refuse(431)
                return
        elif self._in_message and self._overhead > 2 * self.limits.header_bytes + self._body_size:
            self._refuse(431)  # trailers, or chunks of less than their own framing
            return
        if self._owes():
            if self._owed_timer is None:
                self._owed_timer = self.loop.call_at(self._deadline, self._overdue)
        elif self._owed_timer is not None:
            self._owed_timer.cancel()
            self._owed_timer = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_message = self._in_header = True
        self._body_size = self._overhead = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_header:  # else a trailer: no route reads one, and the headers are handed on
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._check_header()
        self._in_header = False
        self._overhead = 0
        self.waiting.pop(self, None)
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            raise _RefusedError

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._in_message and not self.pipeline:
            # Whoever goes on sending is not listening to the answer.
            self.loop.call_later(LINGER_SECONDS, self.transport.close)
        elif not self._in_message:
            self.waiting[self] = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_closing()

    def shutdown(self) -> None:
        super().shutdown()
        self._watch_closing()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Answer what the parser did not take, or what a callback refused, as a problem."""
        status, self._status = self._status, 400
        self._refuse(status)

    def _check_header(self) -> None:
        """Refuse one that is too long and came in one piece, with what follows it perhaps."""
        if self._overhead + self._piece_size <= self.limits.header_bytes:
            return  # so is all that has come since it began
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.header_bytes:
            self._status = 431
            raise _RefusedError

    def _owes(self) -> bool:
        """Whether the next byte must come from the client."""
        return self._in_message or self.cycle is None or bool(self.cycle.response_complete)

    def _start_clock(self) -> None:
        self._deadline = self.loop.time() + self.limits.header_seconds
        self._owed_timer = self.loop.call_at(self._deadline, self._overdue)

    def _overdue(self) -> None:
        self._owed_timer = None
        if self.transport.is_closing():
            return
        now = self.loop.time()
        if self.flow.read_paused:
            self._deadline = now + self.limits.header_seconds  # it is the server that is behind
        due = self._deadline + self._body_size / self.limits.min_body_rate
        if due > now:
            self._owed_timer = self.loop.call_at(due, self._overdue)
        elif self._in_message:
            self._refuse(408)
        else:
            self._drop("idle")

    def _refuse(self, status: int) -> None:
        """Answer with a problem document where no other answer has begun; then close."""
        code, detail, hint = REFUSALS[status]
        cycle = self.cycle
        unanswered = cycle is None or cycle.response_complete or not cycle.response_started
        if unanswered and not self.pipeline:
            self.transport.write(_problem(status, code, detail, hint))
        self._drop(code)

    def _drop(self, reason: str) -> None:
        self.limits.on_refusal(reason)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
        self._watch_closing()

    def _make_room(self) -> None:
        """Close the connection that has waited longest for its client; this one if none waits."""
        oldest = next(iter(self.waiting))
        self.waiting.pop(oldest)
        if oldest is self:
            self._refuse(503)
        else:
            oldest._drop("crowded")  # noqa: SLF001

    def _watch_closing(self) -> None:
        """A closed transport still waits for its client to take what was written."""
        if self._send_timer is None and self.transport.get_write_buffer_size():
            self._watch_sending(self.transport.get_write_buffer_size())

    def _watch_sending(self, before: int) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
        self._send_timer = self.loop.call_later(self.limits.send_seconds, self._stalled, before)

    def _stalled(self, before: int) -> None:
        self._send_timer = None
        left = self.transport.get_write_buffer_size()
        if 0 < left < before:
            self._watch_sending(left)
        elif left:
            self.limits.on_refusal("stalled")
            self.transport.abort()


class _RefusedError(httptools.HttpParserError):
    """Stops the parser from inside one of its callbacks."""


def _problem(status: int, code: str, detail: str, hint: str) -> bytes:
    body = json.dumps(
        {
            "type": "about:blank",
            "title": STATUS_LINE[status].decode().split(" ", 2)[2].strip(),
            "status": status,
            "detail": detail,
            "instance": "",
            "code": code,
            "hint": hint,
        }
    ).encode()
    headers = (
        f"content-type: application/problem+json\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return STATUS_LINE[status] + headers.encode() + body
