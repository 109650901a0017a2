"""One request to an application without a server, its path as raw as a hostile client's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes


class Answered(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def ask(
    app: Any,
    method: str,
    path: str,
    *,
    query: str = "",
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
) -> Answered:
    """The answer. `path` may be percent-encoded: it is decoded as a server does."""
    return asyncio.run(ask_async(app, method, path, query, headers or {}, body))


async def ask_async(
    app: Any, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes
) -> Answered:
    raw = path.encode("utf-8", "surrogateescape")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": unquote_to_bytes(raw).decode("utf-8", "replace"),
        "raw_path": raw,
        "query_string": query.encode(),
        "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in (headers or {}).items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "root_path": "",
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if len(sent) == 0:
            return {"type": "http.request", "body": body, "more_body": False}
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *pieces = sent
    told = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
    return Answered(start["status"], told, b"".join(piece.get("body", b"") for piece in pieces))
