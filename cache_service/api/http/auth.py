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

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cache_service.api.http.log import TOKEN_NAME
from cache_service.api.http.problems import problem_response
from cache_service.api.http.settings import TokenConfig

COOKIE = "kd_cache_token"
"""Cookie with a browser's token. It only reads: the form of another site must not start a build."""

OPEN = frozenset(
    {(method, path) for method in ("GET", "HEAD") for path in ("/healthz", "/readyz")}
    | {("POST", "/login")}
)

LOOPBACK = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]*)?", re.IGNORECASE)
"""Host headers that name this machine. Nobody else can register a name that matches."""

_READING = {"GET", "HEAD", "OPTIONS"}
_LOOKUP = re.compile(r"/v1/caches/[^/]+/lookup")


def token_sha256(secret: str) -> str:
    """The form of a token that the configuration has."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def find_token(tokens: Sequence[TokenConfig], secret: str) -> TokenConfig | None:
    """Find the token of a secret. All are compared, each in constant time."""
    digest = token_sha256(secret)
    matching = [token for token in tokens if hmac.compare_digest(token.sha256, digest)]
    return matching[0] if matching else None


def needed_scope(method: str, path: str) -> str:
    """The scope that a request needs: `read` if it changes nothing, else `build`."""
    reads = method in _READING or (method == "POST" and _LOOKUP.fullmatch(path) is not None)
    return "read" if reads else "build"


class AuthMiddleware:
    """Answers 401, 403 and 421 before a route is matched.

    Args:
        app: the application behind it.
        tokens: of the configuration.
        login: creates the sign-in form that a browser gets instead of a problem document.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Sequence[TokenConfig],
        login: Callable[[Request], Response] | None = None,
    ) -> None:
        self.app = app
        self._tokens = tokens
        self._login = login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the token of a request, or its Host header."""
        refusal = None
        if scope["type"] == "http":
            refuse = self._refuse_stranger if self._tokens else _refuse_other_host
            refusal = refuse(scope, Headers(scope=scope))
        elif scope["type"] != "lifespan":
            raise RuntimeError(f"{scope['type']} is not served")
        await (refusal or self.app)(scope, receive, send)

    def _refuse_stranger(self, scope: Scope, headers: Headers) -> Response | None:
        method, path = scope["method"], scope["path"]
        if (method, path) in OPEN:
            return None
        secret = _secret(method, headers)
        token = find_token(self._tokens, secret) if secret else None
        if token is None:
            if self._login and method == "GET" and "text/html" in headers.get("accept", ""):
                return self._login(Request(scope))
            return problem_response(
                scope,
                401,
                "this request needs a token, and none that the service knows was sent.",
                hint="Send `Authorization: Bearer TOKEN`; kd-cache takes it from KD_CACHE_TOKEN.",
                headers={"WWW-Authenticate": 'Bearer realm="kd-cache"'},
            )
        scope.setdefault("state", {})[TOKEN_NAME] = token.name
        scope_name = needed_scope(method, path)
        if scope_name in token.scopes:
            return None
        return problem_response(
            scope,
            403,
            f"this request needs a token with the scope {scope_name}; yours has "
            f"{', '.join(token.scopes)}.",
            hint="Ask whoever runs the service for such a token.",
        )


def _refuse_other_host(scope: Scope, headers: Headers) -> Response | None:
    # Without the header a request passes: browsers always send one.
    for host in headers.getlist("host"):
        if LOOPBACK.fullmatch(host) is None:
            return problem_response(
                scope,
                421,
                f"the request is for the host {host[:128]!r}, and a service without tokens answers "
                "requests for its own machine only.",
                hint="Use localhost or 127.0.0.1; or configure tokens, and any host name works.",
            )
    return None


def _secret(method: str, headers: Headers) -> str:
    kind, _, secret = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return secret.strip()
    if kind or method not in ("GET", "HEAD"):
        return ""
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookies[COOKIE].value if COOKIE in cookies else ""
