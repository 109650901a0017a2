"""Routes of the pages: each asks `Pages`, and frames what it says with the headers of a page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator, Callable

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, Response, StreamingResponse

from cache_service.api.page.pages import Page, Pages
from cache_service.api.page.static_files import static_file
from cache_service.errors import KdCacheError, NotACacheError

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

GUARDS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of every page and file."""

ALONE_POLICY = (
    "default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
"""Of the sign-in page, which brings its style along: nothing else is open to a stranger."""

EVENT_S = 1.0
"""Seconds between two events."""

router = APIRouter(include_in_schema=False)


def pages_of(request: Request) -> Pages:
    """The pages of this server."""
    pages: Pages = request.app.state.pages
    return pages


def framed(pages: Pages, page: Page) -> Response:
    """A page as a response. What may hold a visitor's secrets is never stored."""
    headers = GUARDS | {"Cache-Control": "no-store" if pages.login else "no-cache"}
    if page.reload_s is not None:
        headers["Refresh"] = str(page.reload_s)
    return HTMLResponse(page.html, page.status, headers)


def framed_alone(page: Page) -> Response:
    """A page that loads nothing, as a response that is stored nowhere."""
    style = static_file("page.css")
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style.content).digest()).decode()
    policy = {"Content-Security-Policy": ALONE_POLICY.format(digest=digest)}
    headers = GUARDS | policy | {"Cache-Control": "no-store"}
    return HTMLResponse(page.html, page.status, headers)


@router.get("/")
def overview(request: Request) -> Response:
    """All caches, builds and traffic."""
    pages = pages_of(request)
    return _told(pages, pages.overview)


@router.get("/caches/{name}")
def cache(request: Request, name: str) -> Response:
    """One cache."""
    pages = pages_of(request)
    return _told(pages, lambda: pages.cache(name))


@router.get("/caches/{name}/explore")
def explore(request: Request, name: str, seed: str = "", sample: str = "") -> Response:
    """One sample under one seed."""
    pages = pages_of(request)
    return _told(pages, lambda: pages.explore(name, seed, sample))


@router.get("/static/{name}")
async def static(request: Request, name: str) -> Response:
    """A file of the page."""
    found = static_file(name)
    if found is None:
        raise NotACacheError(f"there is no file {name[:80]!r}.")
    headers = GUARDS | {"Cache-Control": "no-cache", "ETag": found.etag}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)


@router.get("/v1/events")
async def events(request: Request) -> Response:
    """Figures of builds and traffic once a second, as server-sent events; ends with the server."""
    return StreamingResponse(
        _events(pages_of(request), request.app.state.service.stopping),
        media_type="text/event-stream",
        headers=GUARDS | {"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _events(pages: Pages, stopping: asyncio.Event) -> AsyncIterator[bytes]:
    while not stopping.is_set():
        try:
            event = await run_in_threadpool(pages.event)
            yield b"data: " + json.dumps(event).encode() + b"\n\n"
        except KdCacheError as refusal:  # the queue's disk may be full; the next second may be well
            yield f": {refusal.code}\n\n".encode()
        try:
            await asyncio.wait_for(stopping.wait(), EVENT_S)
        except TimeoutError:
            continue


def _told(pages: Pages, make: Callable[[], Page]) -> Response:
    try:
        return framed(pages, make())
    except KdCacheError as refusal:
        return framed(pages, pages.refused(refusal))
