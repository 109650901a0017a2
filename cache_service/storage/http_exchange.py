"""One question and one answer over HTTP, bounded in time and memory. No retries, no redirects.

Nothing is believed: an answer says how long it is before a byte of it is read, comes as it is
(compressed or in chunks of unknown size it is refused), and has to be over by a deadline, however
slowly it drips.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple, Self

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from cache_service.errors import ConfigError
from cache_service.storage.http_address import Address

CONNECT_S = 10.0
SILENCE_S = 30.0
"""Longest pause within an answer, and what an answer may take that needs no time to travel."""

SLOWEST = 64 << 10
"""Bytes per second below which a line is given up: 8 MiB may take 2 minutes, not a day."""

SLOWEST_BYTES = 8 << 20
"""What comes beyond this has to come sixteen times as fast."""

MAX_PROBLEM_BYTES = 64 << 10
"""Of an answer that is an error: more of it nobody would read."""


class BrokenExchangeError(Exception):
    """There was no answer, or half of one. Internal: the client retries, and words it."""


class BadAnswerError(BrokenExchangeError):
    """There was an answer, of a kind that is not accepted."""


class Question(NamedTuple):
    """A request, without what every request has.

    Attributes:
        method: GET, HEAD or POST.
        target: path and query, below the address.
        headers: further ones.
        body: of a POST.
        limit: bytes that a good answer may have at most.
        patience_s: what the server may take on top, because it was asked to wait.
    """

    method: str
    target: str
    headers: Mapping[str, str] = {}
    body: bytes | None = None
    limit: int = 1 << 20
    patience_s: float = 0.0


class Answer(NamedTuple):
    """A whole response. `headers` has lower-case names; `size` is the length that it states."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    size: int | None


def open_connection(address: Address) -> HTTPConnection:
    """A connection that is opened by its first exchange. Certificates are checked."""
    if address.scheme == "https":
        return HTTPSConnection(
            address.host,
            address.port,
            timeout=CONNECT_S,
            ssl_context=ssl.create_default_context(),
        )
    return HTTPConnection(address.host, address.port, timeout=CONNECT_S)


def exchange(
    connection: HTTPConnection, question: Question, target: str, headers: Mapping[str, str]
) -> Answer:
    """Ask, and read the whole answer.

    Args:
        connection: left open where it can be used again, else closed.
        question: what is asked.
        target: path and query.
        headers: all of them.

    Raises:
        BrokenExchangeError: no answer, or a part of one.
        BadAnswerError: one that is not acceptable.
        ConfigError: the server is not who its address says.
    """
    allowed_s = CONNECT_S + SILENCE_S + question.patience_s + _travel_s(question.limit)
    with _Deadline(connection, allowed_s) as deadline:
        try:
            if not connection.is_connected:
                connection.close()
                connection.timeout = CONNECT_S
                connection.connect()
            deadline.watch(connection.sock)
            connection.timeout = SILENCE_S + question.patience_s
            connection.sock.settimeout(connection.timeout)
            connection.request(
                question.method,
                target,
                body=question.body,
                headers=headers,
                preload_content=False,
                decode_content=False,
            )
            with connection.getresponse() as response:
                answer = _read(response, question)
        except ssl.SSLCertVerificationError as problem:
            connection.close()
            raise ConfigError(
                f"{connection.host} shows a certificate that is not trusted: "
                f"{problem.verify_message}.",
                hint="Name the authority that signed it with SSL_CERT_FILE=FILE.",
            ) from None
        except (HTTPError, OSError, http.client.HTTPException) as problem:
            connection.close()
            if deadline.passed:
                raise BrokenExchangeError(f"no whole answer within {allowed_s:.0f} s") from None
            if isinstance(problem, HTTPError | OSError):
                raise BrokenExchangeError(_named(problem)) from None
            raise BadAnswerError(f"an answer that is not HTTP ({_named(problem)})") from None
        except BaseException:  # Ctrl-C: the rest of this answer must not meet the next question
            connection.close()
            raise
    if answer.headers.get("connection", "").lower() == "close" or deadline.passed:
        connection.close()
    return answer


class _Deadline:
    """Cuts a connection that takes too long. A socket's own timeout starts again at every byte."""

    def __init__(self, connection: HTTPConnection, seconds: float) -> None:
        self.passed = False
        self._connection = connection
        self._sock: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def watch(self, sock: socket.socket) -> None:
        """The socket to cut: http.client forgets it where the answer is the last one."""
        self._sock = sock

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _cut(self) -> None:
        self.passed = True
        sock = self._sock or self._connection.sock
        if sock is not None:
            with suppress(OSError):
                # Not SSLSocket.shutdown, which also forgets the encryption under the reader.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _read(response: BaseHTTPResponse, question: Question) -> Answer:
    headers = {name.lower(): value for name, value in response.headers.items()}
    status, stated = response.status, headers.get("content-length")
    size = int(stated) if stated is not None and _is_size(stated) else None
    if question.method == "HEAD" or status in (204, 304):
        return Answer(status, headers, b"", size)
    good = 200 <= status < 300
    if "transfer-encoding" in headers or size is None:
        problem = "an answer of unstated length"
    elif headers.get("content-encoding", "identity").lower() != "identity":
        problem = "an answer that is compressed, which nobody asked for"
    elif size > (question.limit if good else MAX_PROBLEM_BYTES):
        problem = f"an answer of {size} bytes where at most {question.limit} were to come"
    else:
        return Answer(status, headers, _read_body(response, size), size)
    if good:
        raise BadAnswerError(problem)
    # An error is an error even if what it says cannot be read.
    return Answer(status, headers | {"connection": "close"}, b"", size)


def _read_body(response: BaseHTTPResponse, size: int) -> bytes:
    pieces, left = [], size
    while left:
        # In pieces: what a header states is not allocated before it is there.
        piece = response.read(min(left, 1 << 20))
        if not piece:
            raise BrokenExchangeError(f"an answer that ends {left} bytes before its end")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _travel_s(size: int) -> float:
    slow = min(size, SLOWEST_BYTES)
    return slow / SLOWEST + (size - slow) / (16 * SLOWEST)


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18


def _named(problem: Exception) -> str:
    """What went wrong, in the system's words where it has some; no addresses of objects."""
    system = problem if isinstance(problem, OSError) else problem.__cause__
    if isinstance(system, OSError) and system.strerror:
        return system.strerror
    cause = problem.args[-1] if problem.args else problem
    text = str(cause if isinstance(cause, Exception) else problem).split("\n")[0]
    text = text.split("object at")[-1].split(">: ")[-1]
    shown = "".join(c if c.isprintable() else " " for c in text)[:200].strip()
    return f"{type(problem).__name__}: {shown}" if shown else type(problem).__name__
