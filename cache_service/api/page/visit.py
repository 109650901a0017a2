"""From where a page was requested: what its links and the addresses that people copy begin with."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote, urlencode

from fastapi import Request

_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")
"""Host headers that are repeated on a page: nothing else belongs into a command line."""

SCHEMES = ("http", "https")


class Visit(NamedTuple):
    """One request for a page.

    Attributes:
        origin: scheme, host and port by which the page was requested.
        prefix: path below which a proxy serves the pages; empty without one.
        up: the way from the requested page to the first one, such as `../`; empty for links that
            begin with the prefix.
    """

    origin: str = "http://127.0.0.1:8000"
    prefix: str = ""
    up: str = ""

    def link(self, *parts: str, **query: object) -> str:
        """The way to a page of this server. Every link is made here.

        Without a prefix it is relative to the requested page: it holds below one that nobody named.
        """
        path = "/".join(quote(part, safe="") for part in parts)
        return (self.up or f"{self.prefix}/") + path + (f"?{urlencode(query)}" if query else "")

    def cache_url(self, name: str) -> str:
        """The address under which a train file names a cache."""
        return self.origin + self._replace(up="").link("v1", "caches", name)


def visit_of(request: Request) -> Visit:
    """The scheme, host, port and prefix by which the visitor's browser requested a page.

    A proxy names the scheme in `X-Forwarded-Proto`. The header needs no trust: it only changes what
    the sender of the request is shown.
    """
    forwarded = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    scheme = forwarded if forwarded in SCHEMES else request.url.scheme
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        address, port = request.scope.get("server") or ("127.0.0.1", 8000)
        host = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    raw = request.scope.get("raw_path") or request.scope["path"].encode()
    up = "../" * (raw.count(b"/") - 1) or "./"
    prefix = request.scope.get("root_path", "").rstrip("/")
    return Visit(f"{scheme}://{host}", prefix, "" if prefix else up)
