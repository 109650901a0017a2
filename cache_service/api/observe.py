"""One pass around every request: its id, and what became of it for metrics, logs and the page."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cache_service.api.problems import problem_response

REQUEST_ID_HEADER = b"x-request-id"

CLIENT_GONE = 499
"""Status of an answer that nobody waits for any more; it is counted, never sent."""

UNMATCHED = "unmatched"
"""Route of a request that no route took: its path is the client's, and may hold anything."""

log = logging.getLogger("kdcache.requests")

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that is being answered; empty outside of one."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Seen(NamedTuple):
    """A request that has ended.

    Attributes:
        request_id: the client's own, or one made here.
        method: as sent.
        route: template of the route, never the path.
        status: of the answer; 499 where the client left before one began.
        code: of the problem document, or empty.
        seconds: from the whole header to the last byte handed on.
        num_bytes: of the body.
        client: address without port.
        names: parts of the path, where a route took them and the answer is no error.
        at: when it ended, in seconds since 1970.
    """

    request_id: str
    method: str
    route: str
    status: int
    code: str
    seconds: float
    num_bytes: int
    client: str
    names: dict[str, Any]
    at: float


class ObserveMiddleware:
    """Tells every observer of every request once, whatever its end."""

    def __init__(self, app: ASGIApp, observers: Sequence[Callable[[Sequence[Seen]], None]]) -> None:
        self.app = app
        self.observers = tuple(observers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Watch one request go by."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        wanted = _wanted_id(scope)
        header = (REQUEST_ID_HEADER, wanted.encode())
        token = request_id.set(wanted)
        state = scope.setdefault("state", {})
        state["request_id"] = wanted
        status = num_bytes = 0

        async def watch(message: Message) -> None:
            nonlocal status, num_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            elif message["type"] == "http.response.body":
                num_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception:
            log.exception("a request crashed")
            if status:
                raise  # the answer has begun: only closing the connection says that it is broken
            await _crashed(scope)(scope, receive, watch)
        finally:
            seconds = time.perf_counter() - begun
            seen = _seen(scope, wanted, status or CLIENT_GONE, seconds, num_bytes)
            for observer in self.observers:
                observer((seen,))
            request_id.reset(token)


def _crashed(scope: Scope) -> JSONResponse:
    return problem_response(
        scope,
        500,
        "The service failed in a way that it does not know.",
        hint=f"Its log has the reason under request id {scope['state']['request_id']}.",
    )


def _wanted_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == REQUEST_ID_HEADER and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return secrets.token_hex(8)


def _seen(scope: Scope, wanted: str, status: int, seconds: float, num_bytes: int) -> Seen:
    client = scope.get("client")
    return Seen(
        request_id=wanted,
        method=scope["method"],
        route=route_of(scope),
        status=status,
        code=str(scope["state"].get("problem_code", "")),
        seconds=seconds,
        num_bytes=num_bytes,
        client=client[0] if client else "",
        names=dict(scope.get("path_params") or {}) if status < 400 else {},
        at=time.time(),
    )


def route_of(scope: Scope) -> str:
    """Template of the route that took a request."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) and path else UNMATCHED
