"""The routes of the service and its codes to Markdown, read from its own OpenAPI document."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from cache_service.api.app import create_app
from cache_service.api.http.problems import CODES
from cache_service.api.http.settings import ServeConfig
from cache_service.errors import KdCacheError
from docs import codebase

PAGES = (
    ("GET", "/", "The page: caches, builds, traffic."),
    ("GET", "/caches/{name}", "The page of one cache."),
    ("GET", "/caches/{name}/explore", "The page of one sample under one seed."),
    ("GET", "/caches/{name}/find", "Samples worth a look, found in the recorded rows."),
)
"""For people, so not in the document that programs read. A test asks for each."""


def routes() -> str:
    """One line a route: what it takes, and what it is for."""
    rows = ["| route | query | what |", "|---|---|---|"]
    for path, methods in openapi()["paths"].items():
        for method, operation in methods.items():
            queries = [p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"]
            asked = ", ".join(f"`{name}`" for name in queries)
            what = " ".join(operation["description"].split("\n\n")[0].split())
            rows.append(f"| `{method.upper()} {path}` | {asked} | {what} |")
    rows += [f"| `{method} {path}` | | {what} |" for method, path, what in PAGES]
    return "\n".join(rows)


def codes() -> str:
    """Codes that only the service answers with: those of its classes, and those of HTTP's own."""
    rows = {(each.http_status, each.code): _first_line(each) for each in _own_errors()}
    for status, code in CODES.items():
        rows.setdefault((status, code), HTTPStatus(status).description or HTTPStatus(status).phrase)
    lines = ["| status | code | meaning |", "|---|---|---|"]
    lines += [f"| {status} | `{code}` | {what} |" for (status, code), what in sorted(rows.items())]
    return "\n".join(lines)


def _own_errors() -> Iterator[type[KdCacheError]]:
    """Error classes of the service whose code is not one of the family's."""
    family = {each.code for each in codebase.error_classes()}
    found = [KdCacheError]
    for each in found:
        found += each.__subclasses__()
        if each.__module__.startswith("cache_service.api.") and each.code not in family:
            yield each


def _first_line(error: type[KdCacheError]) -> str:
    return (error.__doc__ or "").split("\n")[0]


def openapi() -> dict[str, Any]:
    """The document of a service over an empty folder."""
    with tempfile.TemporaryDirectory() as root:
        return create_app(ServeConfig(root=root)).openapi()
