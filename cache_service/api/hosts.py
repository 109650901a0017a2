"""The name that a request was sent to: where there are no tokens, it must be this machine's own.

A page of another site can have its own name resolved to 127.0.0.1 (DNS rebinding); to the browser
the service is then part of that site, and may be read by its scripts. The Host header tells.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from cache_service.api.problems import problem_response

LOOPBACK = re.compile(rb"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]*)?", re.IGNORECASE)
"""No name that others hand out matches, so nobody can make one of theirs lead here."""


class LoopbackHostMiddleware:
    """Answers 421 where the Host header names another machine, health included.

    A request without the header passes: no browser sends one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or not."""
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
            f"the request is for the host {host[:128].decode('latin-1')!r}, and this service, "
            "which has no tokens, answers for its own machine only.",
            hint="Ask for localhost or 127.0.0.1; or give the service tokens, and any name will "
            "do.",
        )
        await refusal(scope, receive, send)
