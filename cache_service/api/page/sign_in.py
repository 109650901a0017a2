"""Signing in from a browser: a form with a token in, a cookie out that no script can read.

Programs send `Authorization: Bearer` instead. The cookie is the token itself, so that nothing is
kept here, and a token that is taken out of the configuration is out at once. `auth` lets it read
only: another site's form must not start a build.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict, deque
from urllib.parse import parse_qs, urlencode

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from cache_service.api.http.auth import COOKIE, Tokens
from cache_service.api.page.pages import Pages
from cache_service.api.page.routes import framed_alone, pages_of

MAX_FORM_BYTES = 4096
"""A token and a path of this server; what is longer is no sign-in."""

MAX_TRIES = 10
"""Failed tries of one address within TRIES_S."""

MAX_ADDRESSES = 1024
"""Addresses that are remembered: the latest."""

TRIES_S = 60.0

OWN = ("same-origin", "none")
"""What a browser says of a request that no other site made."""

PAGE_QUERY = ("seed", "sample")
"""What a page reads of its address."""

_LOCAL_PATH = re.compile(r"/(?![/\\])[A-Za-z0-9._~/?=&%+-]{0,512}")

router = APIRouter(include_in_schema=False)


class Tries:
    """Failed sign-ins of the last minute, by address: one that guesses does not lock others out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failed: OrderedDict[str, deque[float]] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """Seconds until the next try is heard; 0 where that is now."""
        with self._lock:
            failed = self._failed.get(address)
            if failed is None or len(failed) < MAX_TRIES:
                return 0.0
            return max(failed[0] + TRIES_S - time.monotonic(), 0.0)

    def count(self, address: str) -> None:
        """One more has failed."""
        with self._lock:
            failed = self._failed.setdefault(address, deque(maxlen=MAX_TRIES))
            failed.append(time.monotonic())
            self._failed.move_to_end(address)
            while len(self._failed) > MAX_ADDRESSES:
                self._failed.popitem(last=False)


def local_path(written: str) -> str:
    """A path of this server, `/` where something else is written: nobody is sent elsewhere."""
    return written if _LOCAL_PATH.fullmatch(written) else "/"


def sign_in_form(pages: Pages, request: Request) -> Response:
    """What a visitor without a token is answered, whatever page was asked for."""
    # Only what pages read: an address may hold a token that was put there by mistake.
    kept = [pair for pair in request.query_params.multi_items() if pair[0] in PAGE_QUERY]
    asked = local_path(request.url.path + (f"?{urlencode(kept)}" if kept else ""))
    return framed_alone(pages.sign_in(next_path=asked, status=401))


@router.post("/login")
async def sign_in(request: Request) -> Response:
    """Take the form: a cookie and back to what was asked for, or the form again."""
    pages, tries = pages_of(request), tries_of(request)
    body = await _read_bounded(request)
    fields = parse_qs(body.decode("ascii", "replace"), keep_blank_values=True)
    asked = local_path(fields.get("next", ["/"])[0])
    if request.headers.get("sec-fetch-site", "none") not in OWN:
        said = "Another site sent this form. Type the token here."
        return framed_alone(pages.sign_in(next_path=asked, message=said, status=403))
    if "leave" in fields:
        answer: Response = RedirectResponse("/", 303)
        answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return answer
    tokens = Tokens(request.app.state.service.config.tokens)
    if not tokens:
        return RedirectResponse(asked, 303)
    address = request.client.host if request.client else ""
    wait_s = tries.wait_s(address)
    if wait_s:
        said = f"Too many tokens were wrong. Try again in {wait_s:.0f} s."
        return framed_alone(pages.sign_in(next_path=asked, message=said, status=429))
    secret = fields.get("token", [""])[0].strip()
    found = tokens.find(secret)
    if found is None or "read" not in found.scopes or not secret.isascii():
        tries.count(address)
        said = "This token is not known here." if found is None else "This token may not read."
        return framed_alone(pages.sign_in(next_path=asked, message=said, status=401))
    answer = RedirectResponse(asked, 303)
    secure = "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
    answer.set_cookie(COOKIE, secret, path="/", httponly=True, samesite="strict", secure=secure)
    answer.headers["Cache-Control"] = "no-store"
    return answer


def tries_of(request: Request) -> Tries:
    """The failed sign-ins of this server."""
    state = request.app.state
    if not hasattr(state, "sign_in_tries"):
        state.sign_in_tries = Tries()
    tries: Tries = state.sign_in_tries
    return tries


async def _read_bounded(request: Request) -> bytes:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_FORM_BYTES:
            return b""
    return body
