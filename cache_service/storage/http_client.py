"""A bounded, retrying HTTP client for one server that holds caches.

Connections are pooled by urllib3, directly or through the proxy that the environment names. The
rest of urllib3's convenience is switched off, because a response is not trusted here: its body is
read up to a limit, it has to be complete by a deadline however slowly it arrives, and redirects are
not followed since the token would go with them. Retries are bounded by time and not by count
(`urllib3.Retry` counts), and also cover damaged bodies and rows that the server is still recording.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import SplitResult, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, ReadTimeoutError
from urllib3.response import BaseHTTPResponse
from urllib3.util import Timeout, make_headers

from cache_service import interrupts
from cache_service.errors import (
    ConfigError,
    CorruptError,
    KdCacheError,
    NotACacheError,
    RowsNotBuiltError,
    StorageError,
)
from cache_service.storage import retries as waits
from cache_service.storage.http_body import IncompleteBodyError, InvalidBodyError, read_body
from cache_service.storage.http_proxy import proxy_of
from cache_service.storage.retries import DEFAULT_RETRIES, RetryPolicy

T = TypeVar("T")

LOG = logging.getLogger(__name__)

TOKEN_VARIABLE = "KD_CACHE_TOKEN"  # noqa: S105  the name of a variable, not a token
TOKEN_FILE_VARIABLE = "KD_CACHE_TOKEN_FILE"  # noqa: S105  as above

CONNECT_S = 10.0
SILENCE_S = 30.0
"""Longest pause within a response, and what a response may take besides its transfer time."""

SLOWEST_BYTES_PER_S = 64 << 10
"""A connection slower than this is given up: 8 MiB may take 2 minutes, not a day."""

SLOW_LIMIT_BYTES = 8 << 20
"""Bytes beyond this have to arrive sixteen times as fast."""

MAX_PROBLEM_BYTES = 64 << 10
"""Largest body of an error response that is read."""

MAX_RETRY_AFTER_S = 30.0
"""A server may ask for a longer pause; it is asked again after this one all the same."""

SAY_EVERY_S = 10.0
"""How often a client that waits for rows logs what for."""

NO_ROUTE = "not_found"
"""The service's error code for a path where no cache can be: the address is wrong."""

_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{1,1024}")
"""What RFC 6750 allows in a bearer token: no space and no line break, so no second header."""

_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_BUSY_STATUSES = frozenset({408, 425, 429, 502, 503, 504})
_ERRORS_BY_CODE = {
    kind.code: kind
    for kind in KdCacheError.__subclasses__()
    if kind.__module__ == KdCacheError.__module__
}


class Address(NamedTuple):
    """A checked URL. `path` starts with `/` and does not end with one, or is empty."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        """Scheme, host and port, with the default port left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"

    @property
    def url(self) -> str:
        """The URL in its only spelling; safe to print."""
        return self.origin + self.path


def parse_address(url: str) -> Address:
    """Parses the URL of a cache on a server.

    Raises:
        ConfigError: not an http or https URL, or one with a password, a query or a fragment. The
            message does not repeat any part of the URL that could be secret.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as problem:
        raise ConfigError("the URL of the cache has an invalid host or port.") from problem
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            "the URL of a cache holds a user name or a password, which would end up in logs.",
            hint=f"Leave it out and put the token into the environment variable {TOKEN_VARIABLE}.",
        )
    host = parts.hostname or ""
    # urlsplit drops line breaks and tabs silently; a URL that contains one is refused instead.
    printable = url.isascii() and url.isprintable() and " " not in url and "\\" not in url
    if not printable or parts.scheme not in _DEFAULT_PORTS or not _HOST.fullmatch(host):
        raise ConfigError(
            f"{_printable_origin(parts)} is not the URL of a server.",
            hint="Write http(s)://HOST[:PORT]/v1/caches/NAME.",
        )
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise ConfigError(
            f"the URL of the cache at {_printable_origin(parts)} has a query or a fragment.",
            hint="Write http(s)://HOST[:PORT]/v1/caches/NAME, and nothing after it.",
        )
    path = parts.path.rstrip("/")
    return Address(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme], path)


def _printable_origin(parts: SplitResult) -> str:
    host = "".join(c for c in parts.hostname or "" if c.isprintable())
    return f"{parts.scheme or 'URL'}://{host}"


def read_token() -> str | None:
    """Reads the bearer token from the environment, or from the file that the environment names.

    It is read for each request, and is never part of a URL, file, pickle, log line or message.

    Raises:
        ConfigError: the file cannot be read, or its content is not a token.
    """
    where, token = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE)
    if not token:
        path = os.environ.get(TOKEN_FILE_VARIABLE)
        if not path:
            return None
        where = f"the file that {TOKEN_FILE_VARIABLE} names"
        try:
            with open(path, encoding="ascii") as file:  # noqa: PTH123  a variable's raw value
                token = file.read(4096).strip()
        except (OSError, ValueError) as problem:
            raise ConfigError(f"{where} cannot be read ({type(problem).__name__}).") from None
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{where} does not hold a token: it has {len(token)} characters, and some of them are "
            "not allowed in a token.",
            hint="Put in the one line that `kd-cache token` printed.",
        )
    return token


class Request(NamedTuple):
    """A request without the headers that every request has.

    Attributes:
        method: GET, HEAD or POST.
        target: path and query, relative to the address of the client.
        headers: additional ones.
        body: of a POST.
        limit: largest body of a successful response, in bytes.
        server_wait_s: time that the server was asked to wait before it answers, in seconds.
    """

    method: str
    target: str
    headers: Mapping[str, str] = {}
    body: bytes | None = None
    limit: int = 1 << 20
    server_wait_s: float = 0.0

    @property
    def deadline_s(self) -> float:
        """Seconds in which the response has to be complete."""
        slow = min(self.limit, SLOW_LIMIT_BYTES)
        transfer_s = slow / SLOWEST_BYTES_PER_S
        transfer_s += (self.limit - slow) / (16 * SLOWEST_BYTES_PER_S)
        return CONNECT_S + SILENCE_S + self.server_wait_s + transfer_s


class Response(NamedTuple):
    """A complete response. The names in `headers` are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class _NoResponseError(Exception):
    """The connection failed, or the response is incomplete."""


class _InvalidResponseError(Exception):
    """There is a response, but not one that is accepted here."""


class _Failure(NamedTuple):
    """A failed attempt that is worth repeating.

    Attributes:
        error: raised if there is no further attempt.
        kind: there was no response; it was invalid; or the rows are not recorded yet.
        retry_after_s: pause that the server asked for.
    """

    error: KdCacheError
    kind: Literal["no response", "invalid", "not recorded"]
    retry_after_s: float = 0.0


class HttpClient:
    """Sends requests to one server.

    A client may be pickled and survives a fork: each process opens its own connections.
    """

    def __init__(self, url: str, retries: RetryPolicy = DEFAULT_RETRIES) -> None:
        self.address = parse_address(url)
        self.url = self.address.url
        self.retries = retries
        self._has_answered = False
        self._open_pool()

    def __getstate__(self) -> dict[str, Any]:
        """Without connections and without the token."""
        return {"url": self.url, "retries": self.retries, "has_answered": self._has_answered}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], state["retries"])  # type: ignore[misc]  # the same class
        self._has_answered = state["has_answered"]

    def send(
        self,
        request: Request,
        parse: Callable[[Response], T],
        *,
        accept: Container[int] = (),
        wait_s: float = 0.0,
    ) -> T:
        """Sends the request, repeatedly if need be, and returns what `parse` makes of the response.

        Args:
            request: what to send.
            parse: turns a response into a value; raises CorruptError if the response does not
                answer the request, which is then repeated.
            accept: error statuses that are passed to `parse`, too.
            wait_s: how long to wait for rows that are planned but not recorded, in seconds.

        Raises:
            StorageError: no response in time, or none that is valid.
            CorruptError: every response was damaged, or the server reports a damaged cache.
            RowsNotBuiltError: not recorded, or not within `wait_s`.
            ConfigError: the server does not accept the token.
            KdCacheError: any other error that the server reports.
        """
        began = outage_began = time.monotonic()
        failures = invalid = 0
        warned, said = False, began - SAY_EVERY_S
        while True:
            result = self._attempt(request, parse, accept)
            if not isinstance(result, _Failure):
                return result[0]
            now = time.monotonic()
            pause = max(result.retry_after_s, self.retries.pause_s(failures))
            if result.kind == "not recorded":
                # The server is up: a later outage gets its full time again.
                outage_began, failures, warned = now, 0, False
                end = began + wait_s
                pause = min(pause, max(end - now, 0.0))
                give_up = now >= end
                if not give_up and now - said >= SAY_EVERY_S:
                    waited = f"{now - began:.0f} s of at most {wait_s:.0f} s"
                    LOG.warning("waiting for rows, %s: %s", waited, result.error.message)
                    said = now
            else:
                failures += 1
                invalid += result.kind == "invalid"
                limit_s = self.retries.total_s if self._has_answered else self.retries.first_s
                end = outage_began + limit_s
                give_up = invalid >= self.retries.attempts or now + pause > end
                if not (warned or give_up) and now + pause - outage_began >= waits.WARN_AFTER_S:
                    LOG.warning("%s Retrying for %.0f s more.", result.error.message, end - now)
                    warned = True
            if give_up:
                raise result.error
            interrupts.pause(pause)

    def _attempt(
        self, request: Request, parse: Callable[[Response], T], accept: Container[int]
    ) -> tuple[T] | _Failure:
        what = f"{request.method} {self.url}{request.target}"
        try:
            response = self._exchange(request)
        except _InvalidResponseError as problem:
            return _Failure(CorruptError(f"{what} got {problem}{self._via}."), "invalid")
        except _NoResponseError as problem:
            hint = f"Check the address, and that `kd-cache serve` runs on {self.address.host}."
            if self._proxy is not None:
                hint += f" NO_PROXY={self.address.host} leaves out the proxy."
            error = StorageError(f"{what} got no answer{self._via}: {problem}.", hint=hint)
            return _Failure(error, "no response")
        self._has_answered = True
        document = _problem_document(response)
        wrong_address = document.get("code") in (NotACacheError.code, NO_ROUTE)
        accepted = response.status in accept and not wrong_address
        if 200 <= response.status < 300 or (accepted and (document or response.status != 404)):
            try:
                return (parse(response),)
            except CorruptError as damage:
                return _Failure(damage, "invalid")
        return self._judge(what, response, document)

    def _judge(self, what: str, response: Response, document: dict[str, Any]) -> _Failure:
        """A failure if the request may succeed later; raises the error otherwise."""
        error = self._error(what, response, document)
        retry_after_s = _retry_after(response)
        if isinstance(error, RowsNotBuiltError) and response.status == 503:
            return _Failure(error, "not recorded", retry_after_s)
        if response.status in _BUSY_STATUSES:
            return _Failure(error, "no response", retry_after_s)
        redirect = 300 <= response.status < 400
        # A bare status may itself be damage on the way; one that a document repeats is meant.
        meant = document and (response.status < 500 or document["code"] == CorruptError.code)
        by_proxy = self._proxy is not None and isinstance(error, ConfigError)
        if redirect or meant or by_proxy:
            raise error
        return _Failure(error, "invalid")

    def _error(self, what: str, response: Response, document: dict[str, Any]) -> KdCacheError:
        status = response.status
        if self._proxy is not None and not document and status in (401, 403, 407):
            return ConfigError(
                f"{what} is refused{self._via}, with status {status}.",
                hint=f"Write http://USER:PASSWORD@HOST:PORT into {self._proxy.variable} if the "
                f"proxy asks for a password, or name {self.address.host} in NO_PROXY.",
            )
        if status in (401, 403):
            return self._token_error(status)
        if 300 <= status < 400:
            return StorageError(
                f"{what} is redirected ({status}) to {_clean(response.headers.get('location'))}: "
                "redirects are not followed, because the token would go with them.",
                hint="Use the final address.",
            )
        if document and document["code"] != NO_ROUTE:
            kind = _ERRORS_BY_CODE.get(document["code"], StorageError)
            detail = _clean(document.get("detail")) or f"status {status}"
            return kind(f"{self.url} says: {detail}", hint=_clean(document.get("hint")))
        if status == 404:
            return NotACacheError(
                f"no cache at {self.url}: the server there answers 404.",
                hint="Write http(s)://HOST[:PORT]/v1/caches/NAME; HOST/v1/caches lists the names.",
            )
        return StorageError(f"{what} is answered with status {status}.")

    def _token_error(self, status: int) -> ConfigError:
        if read_token() is None:
            found, wanted = "asks for a token, and none is set here", "a token that it accepts"
        elif status == 401:
            found, wanted = "does not know the token that was sent", "a token that it accepts"
        else:
            found, wanted = "does not allow this request with this token", "one with that scope"
        return ConfigError(
            f"{self.url} {found} ({status}).",
            hint=f"Put {wanted} into the environment variable {TOKEN_VARIABLE}.",
        )

    @property
    def _via(self) -> str:
        """For messages: through which proxy, and why."""
        proxy = self._proxy
        return "" if proxy is None else f" through the proxy {proxy.url} of {proxy.variable}"

    def _exchange(self, request: Request) -> Response:
        """One request and its complete response, over a pooled connection."""
        token = read_token()
        headers = {"Accept-Encoding": "identity", "User-Agent": "kd-cache", **request.headers}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        headers |= self._proxy_headers
        if self._process != os.getpid():  # after a fork these connections are the parent's
            self._open_pool()
        deadline = time.monotonic() + request.deadline_s
        with self._translated_errors(request.deadline_s):
            response = self._pool.urlopen(
                request.method,
                self._target_prefix + request.target,
                body=request.body,
                headers=headers,
                retries=False,
                redirect=False,
                assert_same_host=False,  # a proxy is asked for the server's whole URL
                timeout=Timeout(CONNECT_S, SILENCE_S + request.server_wait_s),
                preload_content=False,
                decode_content=False,
            )
            try:
                result = _read(response, request, deadline)
            except BaseException:
                # Also after Ctrl-C: unread bytes must not be taken for the next response.
                response.close()
                raise
            response.release_conn()
        return result

    @contextmanager
    def _translated_errors(self, allowed_s: float) -> Iterator[None]:
        try:
            yield
        except (HTTPError, OSError, http.client.HTTPException) as problem:
            causes = list(_causes(problem))
            for cause in causes:
                if isinstance(cause, ssl.SSLCertVerificationError):
                    raise ConfigError(
                        f"{self.address.host} shows a certificate that is not trusted: "
                        f"{cause.verify_message}.",
                        hint="Name the authority that signed it with SSL_CERT_FILE=FILE.",
                    ) from None
            if isinstance(problem, ReadTimeoutError | TimeoutError):
                raise _NoResponseError(f"no complete response within {allowed_s:.0f} s") from None
            root = causes[-1]
            broken_off = isinstance(root, OSError | http.client.IncompleteRead)
            if isinstance(root, http.client.HTTPException) and not broken_off:
                raise _InvalidResponseError(
                    f"a response that is not HTTP ({_describe(root)})"
                ) from None
            raise _NoResponseError(_describe(root)) from None

    def _open_pool(self) -> None:
        self._process = os.getpid()
        address, tls = self.address, dict[str, Any]()
        if address.scheme == "https":
            tls["ssl_context"] = ssl.create_default_context()
        self._proxy = proxy = proxy_of(address.scheme, address.host, address.port)
        self._target_prefix, self._proxy_headers = address.path, {}
        if proxy is None:
            kind = _POOLS[address.scheme]
            self._pool = kind(address.host, address.port, maxsize=4, **tls)
            return
        credentials = make_headers(proxy_basic_auth=proxy.user) if proxy.user else {}
        manager = urllib3.ProxyManager(proxy.url, maxsize=4, proxy_headers=dict(credentials), **tls)
        manager.pool_classes_by_scheme = _POOLS
        self._pool = manager.connection_from_host(address.host, address.port, address.scheme)
        if address.scheme == "http":  # the proxy takes the whole URL, and no tunnel
            self._target_prefix, self._proxy_headers = address.url, dict(credentials)


class _HeaderDeadline:
    """Limits the time in which status line and headers arrive to the connection's timeout.

    The timeout of a socket starts again at every byte, so a server that sends one byte a second
    would keep a reader for hours.
    """

    sock: Any
    timeout: Any

    def getresponse(self) -> Any:
        """The response without its body; TimeoutError if it is not there in time."""
        sock, fired = self.sock, threading.Event()

        def cut() -> None:
            fired.set()
            with suppress(OSError):
                # Not SSLSocket.shutdown, which also forgets the encryption under the reader.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

        timer = threading.Timer(float(self.timeout), cut)
        timer.daemon = True
        timer.start()
        try:
            response = super().getresponse()  # type: ignore[misc]  # mixed into a connection
        except (OSError, http.client.HTTPException):
            if fired.is_set():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
        if fired.is_set():  # the cut looked like a regular end of the headers
            response.close()
            raise TimeoutError
        return response


class _HttpConnection(_HeaderDeadline, urllib3.connection.HTTPConnection):
    pass


class _HttpsConnection(_HeaderDeadline, urllib3.connection.HTTPSConnection):
    pass


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HttpConnection


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection


_POOLS: dict[str, Any] = {"http": _HttpPool, "https": _HttpsPool}


def _read(response: BaseHTTPResponse, request: Request, deadline: float) -> Response:
    headers = {name.lower(): value for name, value in response.headers.items()}
    status = response.status
    if request.method == "HEAD" or status in (204, 304):
        response.drain_conn()
        return Response(status, headers, b"")
    successful = 200 <= status < 300
    limit = request.limit if successful else MAX_PROBLEM_BYTES
    try:
        return Response(
            status, headers, read_body(response, headers, limit=limit, deadline=deadline)
        )
    except InvalidBodyError as problem:
        if successful:
            raise _InvalidResponseError(str(problem)) from None
        # An error status counts even if its body cannot be read.
        response.close()
        return Response(status, headers, b"")
    except IncompleteBodyError as problem:
        raise _NoResponseError(str(problem)) from None


def _problem_document(response: Response) -> dict[str, Any]:
    """The problem document of an error response; empty if there is none with this very status."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if response.status < 400 or kind != "application/problem+json":
        return {}
    try:
        document = json.loads(response.body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(document, dict) or document.get("status") != response.status:
        return {}
    return document | {"code": str(document.get("code"))}


def _retry_after(response: Response) -> float:
    text = response.headers.get("retry-after", "")
    return min(float(text), MAX_RETRY_AFTER_S) if text.isascii() and text.isdigit() else 0.0


def _clean(text: Any) -> str:
    """A server's text as one printable line of at most 500 characters, without the token."""
    if not isinstance(text, str):
        return ""
    token = read_token()
    shown = text[:2000].replace(token, "***") if token else text[:2000]
    return "".join(c if c.isprintable() else " " for c in shown)[:500]


def _causes(problem: BaseException) -> Iterator[BaseException]:
    """The exception and what it wraps, outermost first. urllib3 wraps causes in its arguments."""
    inner: BaseException | None = problem
    while inner is not None:
        yield inner
        wrapped = [arg for arg in inner.args if isinstance(arg, BaseException)]
        inner = wrapped[-1] if wrapped else inner.__cause__


def _describe(problem: BaseException) -> str:
    """The system's description of a failure if it has one, without addresses of objects."""
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    text = (str(problem).splitlines() or [""])[0].split("object at")[-1].split(">: ")[-1]
    shown = "".join(c if c.isprintable() else " " for c in text)[:200].strip()
    return f"{type(problem).__name__}: {shown}" if shown else type(problem).__name__
