"""Log lines as JSON, one object a line on stderr: no query strings, no headers, no secrets."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from typing import TextIO

from cache_service.api.observe import Seen, request_id

LOGGER = "kdcache"
"""Parent of this service's loggers; uvicorn's lines go the same way."""

SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|(ACCESS|API|PRIVATE)_?KEY")
"""Environment variables whose values must not be printed."""

MIN_SECRET_CHARS = 8
"""A shorter value would blot out innocent words."""

_to_json = json.JSONEncoder(default=str).encode
"""Made once: json.dumps with a default makes one for every line."""

_BEARER = re.compile(r"(?i)\b(bearer|basic)(\s+|%20|\+)[A-Za-z0-9._~+/=-]+")
_requests = logging.getLogger(f"{LOGGER}.requests")
_quoted = json.encoder.encode_basestring_ascii


class Redactor:
    """Replaces secrets of the environment and bearer credentials by stars."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = tuple(sorted(set(secrets), key=len, reverse=True))

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Redactor:
        """One that knows what this process was given to keep."""
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
    """A record as one line of JSON: time, level, logger, message, request id, and its fields."""

    def __init__(self, redact: Redactor) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        line["message"] = self._redact(record.getMessage())
        if request_id.get():
            line["request_id"] = request_id.get()
        if record.exc_info:
            line["exception"] = self._redact(self.formatException(record.exc_info))
        return _to_json(line)


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes records, and lines that are made already."""

    def write_lines(self, lines: Sequence[str]) -> None:
        """As `emit` would write them, in one go. A stream that is gone stops nobody."""
        with self.lock or nullcontext(), suppress(OSError, ValueError):
            self.stream.write("".join(line + self.terminator for line in lines))
            self.stream.flush()


def set_up_logs(stream: TextIO | None = None, *, level: int = logging.INFO) -> None:
    """Send this service's and uvicorn's lines to a stream (stderr), in place of what was set."""
    handler = LineHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(Redactor.of_environment()))
    for name in (LOGGER, "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.setLevel(level)
        logger.propagate = name == "uvicorn.error"
    _requests.handlers, _requests.propagate = [handler], False


def log_requests(batch: Sequence[Seen]) -> None:
    """One line for each request that has ended."""
    lines = [request_line(seen) for seen in batch if _requests.isEnabledFor(_level(seen))]
    for handler in _requests.handlers:
        if lines and isinstance(handler, LineHandler):
            handler.write_lines(lines)


def _level(seen: Seen) -> int:
    return logging.ERROR if seen.status >= 500 else logging.INFO


def request_line(seen: Seen) -> str:
    """The line of a request that has ended.

    Written by hand: a record, its formatting and an encoder take a tenth of a lookup's time.
    """
    level = logging.getLevelName(_level(seen)).lower()
    moment = datetime.fromtimestamp(seen.at, UTC).isoformat(timespec="milliseconds")
    code = f', "code": {_quoted(seen.code)}' if seen.code else ""
    names = f', "names": {_to_json(seen.names)}' if seen.names else ""
    return (
        f'{{"time": "{moment}", "level": "{level}", "logger": "{_requests.name}", '
        f'"message": "request", "request_id": {_quoted(seen.request_id)}, '
        f'"method": {_quoted(seen.method)}, "route": {_quoted(seen.route)}, '
        f'"status": {seen.status}, "seconds": {round(seen.seconds, 6)!r}, '
        f'"bytes": {seen.num_bytes}, "client": {_quoted(seen.client)}{code}{names}}}'
    )
