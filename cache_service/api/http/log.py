"""What is known of every request: its id, its record, and JSON log lines.

`RequestLogMiddleware` stands around the whole application. It gives each request an id and passes
one `RequestRecord` of each to its observers (metrics, traffic figures, the log) when it has ended.
Log lines are JSON objects on stderr, one per line, without query strings, headers or secrets.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, NamedTuple, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cache_service.api.http.problems import problem_response

TOKEN_NAME = "token_name"  # noqa: S105  a key, not a token
"""Key in a request's state: the name of its token in the configuration."""

CLIENT_GONE = 499
"""Status of a request whose client closed the connection. It is counted, never sent."""

UNMATCHED = "unmatched"
"""Route of a request that no route matched: its path is the client's, and may hold anything."""

LOGGER = "kdcache"
"""Parent of this service's loggers."""

SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|(ACCESS|API|PRIVATE)_?KEY")
"""Environment variables whose values must not be printed."""

MIN_SECRET_CHARS = 8
"""Shorter values are not replaced, because they would also match ordinary words."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the current request; empty outside of one."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BEARER = re.compile(r"(?i)\b(bearer|basic)(\s+|%20|\+)[A-Za-z0-9._~+/=-]+")
_log = logging.getLogger(f"{LOGGER}.requests")


class RequestRecord(NamedTuple):
    """A request that has ended.

    Attributes:
        route: template of the route, never the path.
        status: of the response; 499 if the client left before one began.
        code: of the problem document, or empty.
        seconds: from the end of the request's header to the last byte passed to the server.
        bytes: of the response body.
        client: address without port.
        token: name of the token in the configuration; empty without one.
        names: parts of the path that the route names; empty for an error.
    """

    request_id: str
    method: str
    route: str
    status: int
    code: str
    seconds: float
    bytes: int
    client: str
    token: str
    names: dict[str, Any]


class RequestLogMiddleware:
    """Passes the record of every request to every observer once, however the request ends."""

    def __init__(self, app: ASGIApp, observers: Iterable[Callable[[RequestRecord], None]]) -> None:
        self.app = app
        self._observers = tuple(observers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and 500 if the application fails."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        this_id = ""
        for name, value in scope["headers"]:  # quicker than looking it up
            if name == b"x-request-id":
                this_id = value.decode("latin-1")
                break
        if not this_id or not _REQUEST_ID.fullmatch(this_id):
            this_id = secrets.token_hex(8)
        token = request_id.set(this_id)
        state = scope.setdefault("state", {})
        status = num_bytes = 0

        async def counting_send(message: Message) -> None:
            nonlocal status, num_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (b"x-request-id", this_id.encode())
                message["headers"] = [*message.get("headers", ()), header]
            else:
                num_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, counting_send)
        except Exception:
            _log.exception("a request failed with an unexpected error")
            if status:
                raise  # the response has begun: only a closed connection can mark it as broken
            error = problem_response(
                scope,
                500,
                "The service failed with an unexpected error.",
                hint=f"Its log has the reason under request id {this_id}.",
            )
            await error(scope, receive, counting_send)
        finally:
            status = status or CLIENT_GONE
            client = scope.get("client")
            record = RequestRecord(
                request_id=this_id,
                method=scope["method"],
                route=getattr(scope.get("route"), "path", "") or UNMATCHED,
                status=status,
                code=str(state.get("problem_code", "")),
                seconds=round(time.perf_counter() - started, 6),
                bytes=num_bytes,
                client=client[0] if client else "",
                token=str(state.get(TOKEN_NAME, "")),
                names=dict(scope.get("path_params") or {}) if status < 400 else {},
            )
            for observer in self._observers:
                observer(record)
            request_id.reset(token)


class Redactor:
    """Replaces secrets of the environment and bearer credentials by stars."""

    def __init__(self, secrets: Iterable[str]) -> None:
        # The longest first: a secret may contain another one.
        self._secrets = tuple(sorted(set(secrets), key=len, reverse=True))

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Redactor:
        """Create one for the secrets in the environment variables of this process."""
        return cls(
            value
            for name, value in environment.items()
            if SECRET_NAMES.search(name.upper()) and len(value) >= MIN_SECRET_CHARS
        )

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return _BEARER.sub(r"\1\2***", text)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON.

    Keys: time, level, logger, message, request_id, exception, and the record's own `fields`.
    """

    def __init__(self, redact: Redactor) -> None:
        super().__init__()
        self._redact = redact
        self._encode = json.JSONEncoder(default=str).encode

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self._redact(record.getMessage()),
        }
        if request_id.get():
            line["request_id"] = request_id.get()
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self._redact(self.formatException(record.exc_info))
        return self._encode(line)


def log_request(record: RequestRecord) -> None:
    """Log a request that has ended."""
    level = logging.ERROR if record.status >= 500 else logging.INFO
    if not _log.isEnabledFor(level):
        return
    fields = {
        key: value
        for key, value in record._asdict().items()
        if value or key not in ("code", "names", "token")
    }
    # Not `_log.log`, which looks for the line of code that called it: that takes as long again.
    line = logging.LogRecord(_log.name, level, __file__, 0, "request", None, None)
    line.fields = fields
    _log.handle(line)


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:
        """Lose the line without a word: a log stream that is gone must not stop the service."""


def set_up_logs(stream: TextIO | None = None, *, level: int = logging.INFO) -> None:
    """Send the log lines of this service and of uvicorn to a stream (stderr by default)."""
    # Lines do not name threads and processes, so nobody needs to find out.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(Redactor.of_environment()))
    for name in (LOGGER, "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.setLevel(level)
        logger.propagate = name == "uvicorn.error"
