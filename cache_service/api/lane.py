"""Lookups answered before a route is looked for.

FastAPI describes their route and would serve it, too; but routers, its own middleware and
dependencies that there are none of take as long as half of the rows do.
"""

from __future__ import annotations

from fastapi import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cache_service.api.lookup import PATH, lookup
from cache_service.api.problems import REFUSALS, refusal_of


class LookupLane:
    """Answers `POST` of a lookup's path as its route would; leaves everything else to `app`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._route = Route(PATH, lookup, methods=["POST"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        found = self._route.path_regex.fullmatch(scope["path"]) if is_post else None
        if found is None:
            await self.app(scope, receive, send)
            return
        scope["path_params"] = found.groupdict()
        scope["route"] = self._route  # what logs and metrics call it by
        request = Request(scope, receive)
        try:
            response = await lookup(request)
        except REFUSALS as refused:
            response = await refusal_of(request, refused)
        await response(scope, receive, send)
