"""Errors as problem documents (RFC 9457), and the OpenAPI document that describes them.

A problem says what was requested, what was found, and what to do next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from cache_service.config import Frozen
from cache_service.errors import CorruptError, KdCacheError

MEDIA_TYPE = "application/problem+json"

CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    412: "precondition_failed",
    413: "too_large",
    416: "range_not_satisfiable",
    421: "misdirected",
    422: "request",
    429: "busy",
    503: "busy",
}
"""Codes of errors that are not raised as a KdCacheError."""

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

MAX_REPORTED = 4
MAX_DETAIL_CHARS = 600


DESCRIBED = "GET /openapi.json describes every field of this request."
"""Hint of a 422 that has no closer one."""


class Problem(Frozen):
    """An error. `code` is stable; `hint` says what to do next, or is empty."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    hint: str


class RequestError(KdCacheError):
    """The request is not one that this service understands."""

    code = "request"
    http_status = 422
    exit_code = 2


class TooLargeError(KdCacheError):
    """More was requested than one response may hold."""

    code = "too_large"
    http_status = 413
    exit_code = 2


def problem_response(
    scope: Scope,
    status: int,
    detail: str,
    *,
    code: str = "",
    hint: str = "",
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Create the response of a problem, and note its code for logs and metrics."""
    code = code or CODES.get(status, "error")
    scope.setdefault("state", {})["problem_code"] = code
    problem = Problem(
        type="about:blank",
        title=HTTPStatus(status).phrase if status != 499 else "Error",
        status=status,
        detail=detail[:MAX_DETAIL_CHARS],
        instance=scope["path"][:MAX_DETAIL_CHARS],
        code=code,
        hint=hint or (DESCRIBED if status == 422 else ""),
    )
    headers = {"Cache-Control": "no-store", **(headers or {})}
    return JSONResponse(problem.model_dump(), status, headers=headers, media_type=MEDIA_TYPE)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the errors of a route for OpenAPI: the given statuses, and those of all routes."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    every = sorted({400, 401, 403, 421, 422, 500, 503, *statuses})
    return {s: {"description": HTTPStatus(s).phrase, "content": content} for s in every}


def add_problem_handlers(app: FastAPI) -> None:
    """Make the application answer every error with a problem document."""
    for kind in (KdCacheError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_error)


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """The problem document of an error that a route raised."""
    if isinstance(error, CorruptError) and "name" in request.path_params:
        request.app.state.service.catalog.damage.note(request.path_params["name"], error)
    if isinstance(error, KdCacheError):
        retry: int | None = getattr(error, "retry_after_s", None)
        return problem_response(
            request.scope,
            error.http_status,
            error.message,
            code=error.code,
            hint=error.hint,
            headers={"Retry-After": str(retry)} if retry is not None else None,
        )
    if isinstance(error, RequestValidationError):
        complaints = [_complaint(each) for each in error.errors()[:MAX_REPORTED]]
        return problem_response(
            request.scope, 422, f"This request is refused: {'; '.join(complaints)}."
        )
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        # Starlette names the methods of the first route at this path only.
        routes, scope = request.app.routes, request.scope
        headers["Allow"] = ", ".join(
            method
            for method in METHODS
            if any(each.matches({**scope, "method": method})[0] is Match.FULL for each in routes)
        )
    return problem_response(request.scope, error.status_code, str(error.detail), headers=headers)


def _complaint(error: Any) -> str:
    """One error of pydantic as a clause: which field, what is wrong, and what was found."""
    place, *path = (str(part) for part in error["loc"])
    field = f"`{'.'.join(path)}` in the {place}" if path else f"the {place}"
    message, kind = str(error["msg"]).replace("\n", " ").rstrip("."), error["type"]
    if kind == "missing":
        return f"{field} is missing"
    if kind == "extra_forbidden":
        return f"{field} is not known here"
    if kind == "value_error":
        return f"{field} {message.removeprefix('Value error, ')}"
    message = message.removeprefix("Input ").removeprefix("should ")
    found = json.dumps(error.get("input"), default=str)
    return f"{field} should {message}, and is {found[:60]}"


def describe(app: FastAPI) -> None:
    """Set the OpenAPI document of an application. It is created when it is first requested."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of an error
        schemas.pop(name, None)
    schemas["Problem"] = Problem.model_json_schema()
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            described = operation.setdefault("responses", {})
            for status, problem in responses().items():
                if MEDIA_TYPE not in described.get(str(status), {}).get("content", {}):
                    described[str(status)] = problem
            if path not in ("/healthz", "/readyz"):
                operation["security"] = [{"token": []}]
    return document
