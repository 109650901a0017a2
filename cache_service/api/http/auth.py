"""Authentication: bearer tokens with the scopes read and build, or requests of this machine only.

The configuration has the SHA-256 of each token. With tokens, every route but those in `OPEN` needs
one. Without tokens, every route is open, the service listens on loopback, and the Host header must
name this machine: the page of another site can have its own name resolved to 127.0.0.1 (DNS
rebinding), so that a browser takes the service for a part of that site.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Sequence
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cache_service.api.http.problems import problem_response
from cache_service.api.http.settings import TokenConfig

COOKIE = "kd_cache_token"
"""Cookie with a browser's token. It only reads: the form of another site must not start a build."""

OPEN = frozenset(
    {
        ("GET", "/healthz"),
        ("HEAD", "/healthz"),
        ("GET", "/readyz"),
        ("HEAD", "/readyz"),
        ("POST", "/login"),
    }
)

_READING = {"GET", "HEAD", "OPTIONS", "PROPFIND"}
_LOOKUP = re.compile(r"/v1/caches/[^/]+/lookup")


class Tokens:
    """The tokens of a configuration."""

    def __init__(self, tokens: Sequence[TokenConfig]) -> None:
        self._tokens = tuple(tokens)

    def __bool__(self) -> bool:
        """Whether any token is configured."""
        return bool(self._tokens)

    def find(self, secret: str) -> TokenConfig | None:
        """Find the token of a secret. All are compared, each in constant time."""
        digest = token_sha256(secret)
        found = None
        for token in self._tokens:
            if hmac.compare_digest(token.sha256, digest):
                found = token
        return found


def token_sha256(secret: str) -> str:
    """The form of a token that the configuration has."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


class AuthMiddleware:
    """Answers 401 and 403 before a route is matched.

    Args:
        app: the application behind it.
        tokens: of the configuration.
        login: creates the sign-in form that a browser gets instead of a problem document.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Tokens,
        login: Callable[[Request], Response] | None = None,
    ) -> None:
        self.app = app
        self._tokens = tokens
        self._login = login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the token of a request."""
        if scope["type"] == "lifespan" or not self._tokens:
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        if (scope["method"], scope["path"]) in OPEN:
            await self.app(scope, receive, send)
            return
        secret = _secret(scope)
        token = self._tokens.find(secret) if secret else None
        scope.setdefault("state", {})["token"] = token.name if token else ""
        needed = needed_scope(scope["method"], scope["path"])
        if token is None:
            await self._unknown(scope)(scope, receive, send)
        elif needed not in token.scopes:
            refusal = problem_response(
                scope,
                403,
                f"this request needs a token with the scope {needed}; yours has "
                f"{', '.join(token.scopes)}.",
                hint="Ask whoever runs the service for such a token.",
            )
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _unknown(self, scope: Scope) -> Response:
        accept = Headers(scope=scope).get("accept", "")
        if self._login is not None and scope["method"] == "GET" and "text/html" in accept:
            return self._login(Request(scope))
        return problem_response(
            scope,
            401,
            "this request needs a token, and none that the service knows was sent.",
            hint="Send `Authorization: Bearer TOKEN`; kd-cache takes it from KD_CACHE_TOKEN.",
            headers={"WWW-Authenticate": 'Bearer realm="kd-cache"'},
        )


def needed_scope(method: str, path: str) -> str:
    """The scope that a request needs: `read` if it changes nothing, else `build`."""
    reads = method in _READING or (method == "POST" and _LOOKUP.fullmatch(path) is not None)
    return "read" if reads else "build"


def _secret(scope: Scope) -> str:
    headers = Headers(scope=scope)
    kind, _, secret = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return secret.strip()
    if kind or scope["method"] not in ("GET", "HEAD"):
        return ""
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(headers.get("cookie", ""))
    except CookieError:
        return ""
    morsel: Any = cookies.get(COOKIE)
    return str(morsel.value) if morsel is not None else ""


LOOPBACK = re.compile(rb"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]*)?", re.IGNORECASE)
"""Host headers that name this machine. Nobody else can register a name that matches."""


class LoopbackHostMiddleware:
    """Answers 421 if the Host header names another machine, for health routes, too.

    A request without the header passes: browsers always send one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the Host header of a request."""
        if scope["type"] == "http":
            for name, value in scope["headers"]:
                if name == b"host" and LOOPBACK.fullmatch(value) is None:
                    await self._refuse(scope, value, receive, send)
                    return
        await self.app(scope, receive, send)

    async def _refuse(self, scope: Scope, host: bytes, receive: Receive, send: Send) -> None:
        refusal = problem_response(
            scope,
            421,
            f"the request is for the host {host[:128].decode('latin-1')!r}, and a service without "
            "tokens answers requests for its own machine only.",
            hint="Use localhost or 127.0.0.1; or configure tokens, and any host name works.",
        )
        await refusal(scope, receive, send)
