"""Routes of the pages: each renders a page with `Pages`, and sends it with the right headers."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse

from cache_service.api.page.rendering import Page, Pages, static_file
from cache_service.api.page.visit import Visit, visit_of
from cache_service.errors import KdCacheError, NotACacheError

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

SECURITY_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # under no-referrer, forms would have the Origin `null`
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Sent with every page and file."""

SIGN_IN_POLICY = (
    "default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
"""Policy of the sign-in page. It contains its style, because a stranger may load nothing else."""

EVENT_S = 1.0
"""Seconds between two events."""

router = APIRouter(include_in_schema=False)


def pages_of(request: Request) -> Pages:
    """The pages of this server."""
    pages: Pages = request.app.state.pages
    return pages


def page_response(pages: Pages, page: Page) -> Response:
    """A page as a response. Pages of visitors who signed in are never stored by a browser."""
    headers = SECURITY_HEADERS | {"Cache-Control": "no-store" if pages.login else "no-cache"}
    if page.location:
        return RedirectResponse(page.location, page.status, headers | {"Cache-Control": "no-store"})
    if page.reload_s is not None:
        headers["Refresh"] = str(page.reload_s)
    return HTMLResponse(page.html, page.status, headers)


def sign_in_response(page: Page) -> Response:
    """The sign-in page as a response, which loads nothing and is never stored."""
    style = static_file("page.css")
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style.content).digest()).decode()
    policy = {"Content-Security-Policy": SIGN_IN_POLICY.format(digest=digest)}
    headers = SECURITY_HEADERS | policy | {"Cache-Control": "no-store"}
    return HTMLResponse(page.html, page.status, headers)


@router.get("/")
def overview(request: Request) -> Response:
    """All caches, builds and traffic."""
    return _page_or_refusal(request, Pages.overview)


@router.get("/caches/{name}")
def cache(request: Request, name: str) -> Response:
    """One cache."""
    return _page_or_refusal(request, lambda pages, visit: pages.cache(name, visit))


@router.get("/caches/{name}/explore")
def explore(request: Request, name: str, seed: str = "", sample: str = "") -> Response:
    """One sample under one seed."""
    return _page_or_refusal(request, lambda pages, visit: pages.explore(name, seed, sample, visit))


@router.get("/caches/{name}/find")
def find(
    request: Request,
    name: str,
    by: str = "random",
    seed: str = "",
    start: Annotated[str, Query(alias="from")] = "",
    wanted: Annotated[str, Query(alias="class")] = "",
) -> Response:
    """Samples worth a look, or a random one."""
    return _page_or_refusal(
        request, lambda pages, visit: pages.find(name, by, seed, start, wanted, visit)
    )


@router.get("/static/{name}")
async def static(request: Request, name: str) -> Response:
    """A file of the page."""
    file = static_file(name)
    if file is None:
        raise NotACacheError(f"there is no file {name[:80]!r}.")
    headers = SECURITY_HEADERS | {"Cache-Control": "no-cache", "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


@router.get("/v1/events")
async def events(request: Request, cache: str = "") -> Response:
    """Figures of builds and traffic once a second, as server-sent events; ends with the server."""
    stopping: asyncio.Event = request.app.state.service.stopping
    if request.method == "HEAD":
        stopping = asyncio.Event()
        stopping.set()
    return StreamingResponse(
        _events(pages_of(request), stopping, cache),
        media_type="text/event-stream",
        headers=SECURITY_HEADERS | {"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _events(pages: Pages, stopping: asyncio.Event, cache: str = "") -> AsyncIterator[bytes]:
    while not stopping.is_set():
        try:
            event = await run_in_threadpool(pages.event, cache)
            yield b"data: " + json.dumps(event).encode() + b"\n\n"
        except KdCacheError as refusal:  # such as a full disk; the next try may succeed
            yield f": {refusal.code}\n\n".encode()
        try:
            await asyncio.wait_for(stopping.wait(), EVENT_S)
        except TimeoutError:
            continue


def _page_or_refusal(request: Request, render: Callable[[Pages, Visit], Page]) -> Response:
    pages, visit = pages_of(request), visit_of(request)
    try:
        return page_response(pages, render(pages, visit))
    except KdCacheError as refusal:
        return page_response(
            pages, pages.refused(refusal, visit, name=request.path_params.get("name", ""))
        )
