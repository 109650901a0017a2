"""Signing in from a browser: a form that takes a token, and a cookie that scripts cannot read.

Programs send `Authorization: Bearer` instead. The cookie is the token itself: the server keeps no
sessions, and a token that is removed from the configuration stops working at once. `auth` accepts
the cookie for reading only, so that a form on another site cannot start a build.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from urllib.parse import parse_qs, urlencode

from cachetools import LRUCache
from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from cache_service.api.http.auth import COOKIE, find_token
from cache_service.api.page.rendering import Pages
from cache_service.api.page.routes import pages_of, sign_in_response
from cache_service.api.page.visit import visit_of

MAX_FORM_BYTES = 4096
"""Enough for a token and a path of this server."""

MAX_ATTEMPTS = 10
"""Failed attempts from one address within WINDOW_S."""

MAX_ADDRESSES = 1024
"""Addresses whose failed attempts are kept: the latest ones."""

WINDOW_S = 60.0

SAME_SITE = ("same-origin", "none")
"""Values of `Sec-Fetch-Site` for a request that no other site made."""

PAGE_PARAMETERS = ("seed", "sample")
"""Query parameters of the pages."""

_LOCAL_PATH = re.compile(r"/(?![/\\])[A-Za-z0-9._~/?=&%+-]{0,512}")

router = APIRouter(include_in_schema=False)


class FailedAttempts:
    """Failed attempts of the last minute, counted by address.

    An address from which tokens are guessed does not lock out visitors at other addresses.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: LRUCache[str, deque[float]] = LRUCache(MAX_ADDRESSES)

    def wait_s(self, address: str) -> float:
        """Seconds until an address may try again; 0 if it may now."""
        with self._lock:
            times = self._times.get(address)
            if times is None or len(times) < MAX_ATTEMPTS:
                return 0.0
            return max(times[0] + WINDOW_S - time.monotonic(), 0.0)

    def add(self, address: str) -> None:
        """Count one more failed attempt."""
        with self._lock:
            times = self._times.setdefault(address, deque(maxlen=MAX_ATTEMPTS))
            times.append(time.monotonic())


def local_path(path: str) -> str:
    """The path if it is one of this server, else `/`: nobody is redirected to another site."""
    return path if _LOCAL_PATH.fullmatch(path) else "/"


def is_own_form(request: Request) -> bool:
    """Whether a form comes from a page of this server, or from no browser.

    Over plain http, browsers do not send `Sec-Fetch-Site`, so the host of `Origin` counts, too.
    """
    headers = request.headers
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site not in (None, *SAME_SITE):
        return False
    if origin is None or (origin == "null" and site is not None):
        return True
    return origin.partition("://")[2].lower() == headers.get("host", "").lower()


def sign_in_form(pages: Pages, request: Request) -> Response:
    """The answer to a visitor without a token, whatever page was requested."""
    # Only parameters of the pages: somebody may have put a token into the address by mistake.
    query = [pair for pair in request.query_params.multi_items() if pair[0] in PAGE_PARAMETERS]
    path = local_path(request.url.path + (f"?{urlencode(query)}" if query else ""))
    page = pages.sign_in(next_path=path, status=401, visit=visit_of(request))
    return sign_in_response(page)


@router.post("/login")
async def sign_in(request: Request) -> Response:
    """Set the cookie and redirect to the requested page, or show the form again."""
    pages, attempts = pages_of(request), failed_attempts_of(request)
    body = await _read_bounded(request)
    fields = parse_qs(body.decode("ascii", "replace"), keep_blank_values=True)
    next_path = local_path(fields.get("next", ["/"])[0])

    def form_again(message: str, status: int) -> Response:
        page = pages.sign_in(
            next_path=next_path, message=message, status=status, visit=visit_of(request)
        )
        return sign_in_response(page)

    if not is_own_form(request):
        return form_again("Another site sent this form. Type the token here.", 403)
    # Relative to this route, so that it holds below a prefix that nobody named.
    next_url, cookie_path = f".{next_path}", visit_of(request).prefix or "/"
    if "leave" in fields:
        response = RedirectResponse("./", 303)
        response.delete_cookie(COOKIE, path=cookie_path, httponly=True, samesite="lax")
        return response
    tokens = request.app.state.service.config.tokens
    if not tokens:
        return RedirectResponse(next_url, 303)
    address = request.client.host if request.client else ""
    wait_s = attempts.wait_s(address)
    if wait_s:
        return form_again(f"Too many tokens were wrong. Try again in {wait_s:.0f} s.", 429)
    secret = fields.get("token", [""])[0].strip()
    token = find_token(tokens, secret)
    if token is None or "read" not in token.scopes or not secret.isascii():
        attempts.add(address)
        unknown = "This server does not know the token."
        return form_again(unknown if token is None else "This token does not allow reading.", 401)
    response = RedirectResponse(next_url, 303)
    secure = "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
    # Lax: a link in a mail or a wiki opens the page; the cookie reads only, whoever sends it.
    response.set_cookie(
        COOKIE, secret, path=cookie_path, httponly=True, samesite="lax", secure=secure
    )
    response.headers["Cache-Control"] = "no-store"
    return response


def failed_attempts_of(request: Request) -> FailedAttempts:
    """The failed attempts at this server."""
    state = request.app.state
    if not hasattr(state, "failed_attempts"):
        state.failed_attempts = FailedAttempts()
    attempts: FailedAttempts = state.failed_attempts
    return attempts


async def _read_bounded(request: Request) -> bytes:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_FORM_BYTES:
            return b""
    return body
