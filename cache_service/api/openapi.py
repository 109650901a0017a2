"""The OpenAPI document: every refusal is a problem document, and a token is a bearer token."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from cache_service.api.problems import MEDIA_TYPE, Problem, responses

UNUSED = ("HTTPValidationError", "ValidationError")
"""FastAPI's own form of a refused request, which nobody is sent."""

OPEN_PATHS = ("/healthz", "/readyz")


def describe(app: FastAPI) -> None:
    """Give the application its document. It is made when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in UNUSED:
        schemas.pop(name, None)
    schemas["Problem"] = Problem.model_json_schema()
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            found = operation.setdefault("responses", {})
            for status, told in responses().items():
                if MEDIA_TYPE not in found.get(str(status), {}).get("content", {}):
                    found[str(status)] = told
            if path not in OPEN_PATHS:
                operation["security"] = [{"token": []}]
    return document
