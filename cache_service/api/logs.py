"""Log lines as JSON, one object a line on stderr: no query strings, no headers, no secrets."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
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
_ENCODER = json.JSONEncoder(default=str)
"""Made once: json.dumps with a default makes one for every line."""

_BEARER = re.compile(r"(?i)\b(bearer|basic)(\s+|%20|\+)[A-Za-z0-9._~+/=-]+")
_requests = logging.getLogger(f"{LOGGER}.requests")


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
        fields: dict[str, object] | None = getattr(record, "fields", None)
        if fields is not None:  # of our own making: nothing of it is secret
            return _to_json(line | fields)
        line["message"] = self._redact(record.getMessage())
        if request_id.get():
            line["request_id"] = request_id.get()
        if record.exc_info:
            line["exception"] = self._redact(self.formatException(record.exc_info))
        return _to_json(line)


def set_up_logs(stream: TextIO | None = None, *, level: int = logging.INFO) -> None:
    """Send this service's and uvicorn's lines to a stream (stderr), in place of what was set."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(Redactor.of_environment()))
    for name in (LOGGER, "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.setLevel(level)
        logger.propagate = name == "uvicorn.error"


def log_request(seen: Seen) -> None:
    """One line for a request that has ended."""
    level = logging.ERROR if seen.status >= 500 else logging.INFO
    if not _requests.isEnabledFor(level):
        return
    fields: dict[str, object] = {
        "message": "request",
        "request_id": seen.request_id,
        "method": seen.method,
        "route": seen.route,
        "status": seen.status,
        "seconds": round(seen.seconds, 6),
        "bytes": seen.num_bytes,
        "client": seen.client,
    }
    if seen.code:
        fields["code"] = seen.code
    if seen.names:
        fields["names"] = seen.names
    # By hand: `log` would look for the line of code that calls, at half the cost of the record.
    record = logging.LogRecord(_requests.name, level, "", 0, "request", None, None)
    record.fields = fields
    _requests.handle(record)
