"""A short way to the two busiest routes: rows, and stored objects.

FastAPI matches routes one by one, resolves dependencies and enters several exit stacks for each
request, which takes longer than sending 64 rows. So these two are called from here; they are
registered with FastAPI all the same, for its document and for every other method.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from cache_service.api.http import rows, zarr
from cache_service.api.http.problems import answer_error
from cache_service.errors import KdCacheError

_PATH = re.compile(r"/v1/caches/([^/]+)/(?:rows|zarr/(.*))")


class _Route(NamedTuple):
    """What the log reads of a route."""

    path: str


ROWS = _Route("/v1/caches/{name}/rows")
OBJECT = _Route("/v1/caches/{name}/zarr/{key:path}")


class DirectRoutes:
    """Answers GET and HEAD of rows and stored objects; everything else goes to the application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        found = None
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            found = _PATH.fullmatch(scope["path"])
        if found is None:
            await self.app(scope, receive, send)
            return
        name, key = found[1], found[2]
        call: Callable[[Request], Any]
        if key is None:
            call, scope["route"], scope["path_params"] = rows.rows, ROWS, {"name": name}
        else:
            call, scope["route"] = zarr.zarr_key, OBJECT
            scope["path_params"] = {"name": name, "key": key}
        request = Request(scope, receive, send)
        try:
            response = await call(request)
        except (KdCacheError, RequestValidationError, HTTPException) as error:
            response = await answer_error(request, error)
        await response(scope, receive, send)
