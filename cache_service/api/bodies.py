"""How long the body of a request may be. It is cut off where it is read, whatever it declares."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cache_service.api.problems import problem_response


class BodyLimitMiddleware:
    """Answers 413 to a body that is too long. FastAPI's own limit answers in plain text."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse by what is declared, or count what comes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > self._max_bytes:
            refusal = problem_response(
                scope, 413, self._detail(), hint="Ask in several requests.", headers=_CLOSE
            )
            await refusal(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise HTTPException(413, self._detail(), _CLOSE)
            return message

        await self.app(scope, counted, send)

    def _detail(self) -> str:
        return f"the body is longer than {self._max_bytes} bytes."


_CLOSE = {"Connection": "close"}
"""The rest of the body is not read, so the connection cannot be used again."""
