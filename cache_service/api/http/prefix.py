"""A path prefix: the service behind a proxy that serves it below a path, such as `https://host/kd/`.

The pages' own links are relative and need no prefix. Cookies, the addresses that pages print, the
`Location` of a build and the OpenAPI document need it: they read `root_path` of the ASGI scope.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cache_service.api.http.problems import problem_response
from cache_service.api.http.settings import is_prefix


class PrefixMiddleware:
    """Sets `root_path`, and takes the prefix from paths that a proxy passed on as they were.

    Args:
        app: the application behind it. It sees paths without the prefix.
        prefix: of the configuration; empty without one.
        trusts_proxy: whether `X-Forwarded-Prefix` counts if the configuration has no prefix, and
            `X-Forwarded-For` names the client.
    """

    def __init__(self, app: ASGIApp, prefix: str, *, trusts_proxy: bool) -> None:
        self.app = app
        self._prefix = prefix
        self._trusts_proxy = trusts_proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, below the root."""
        if scope["type"] == "http":
            refusal = self._take(scope)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _take(self, scope: Scope) -> Response | None:
        """Change the scope, in place: the log reads it, too. A response if the proxy is wrong."""
        prefix = self._prefix
        if self._trusts_proxy:
            headers = Headers(scope=scope)
            # The last address is the one that the proxy itself saw.
            if address := headers.get("x-forwarded-for", "").rpartition(",")[2].strip():
                scope["client"] = (address[:64], 0)
            forwarded = headers.get("x-forwarded-prefix", "").rstrip("/")
            if forwarded and not is_prefix(forwarded):
                return problem_response(
                    scope,
                    400,
                    f"the proxy sent X-Forwarded-Prefix: {forwarded[:80]!r}, which is no prefix.",
                    hint="Have it send a path such as /kd.",
                )
            prefix = prefix or forwarded
        scope["root_path"] = prefix
        path, raw = scope["path"], scope.get("raw_path") or b""
        # A router takes the prefix from a path, too: one that has it twice is left to it.
        if prefix and f"{path}/".startswith(f"{prefix}/") and not path.startswith(2 * prefix):
            scope["path"] = path.removeprefix(prefix) or "/"
            scope["raw_path"] = raw.removeprefix(prefix.encode()) or b"/"
        return None
