"""Every refusal as one problem document (RFC 9457): what was asked, what was found, what to do.

The OpenAPI document: every refusal is a problem document, and a token is a bearer token.
"""

from __future__ import annotations

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

from cache_service.errors import KdCacheError
from cache_service.format.frozen import Frozen

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
"""Codes of refusals that no error class of ours is the cause of."""

REFUSALS = (KdCacheError, RequestValidationError, HTTPException)
"""What stops a request with a reason; anything else is a crash."""

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

MAX_REPORTED = 4
MAX_DETAIL_CHARS = 600


class Problem(Frozen):
    """An error. `code` is stable; `hint` says what to do next, where there is something."""

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
    """More was asked for than one answer may hold."""

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
    """The document as a response, its code noted for logs and metrics."""
    found = code or CODES.get(status, "error")
    scope.setdefault("state", {})["problem_code"] = found
    problem = Problem(
        type="about:blank",
        title=_title(status),
        status=status,
        detail=detail[:MAX_DETAIL_CHARS],
        instance=scope["path"][:MAX_DETAIL_CHARS],
        code=found,
        hint=hint,
    )
    kept = {"Cache-Control": "no-store", **(headers or {})}
    return JSONResponse(problem.model_dump(), status, headers=kept, media_type=MEDIA_TYPE)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route may refuse with, for its OpenAPI description: those named, and what all may."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    every = sorted({400, 401, 403, 421, 422, 500, 503, *statuses})
    return {status: {"description": _title(status), "content": content} for status in every}


def add_problem_handlers(app: FastAPI) -> None:
    """Make the application answer problem documents only."""
    for kind in REFUSALS:
        app.add_exception_handler(kind, refusal_of)


async def refusal_of(request: Request, error: Exception) -> JSONResponse:
    """What a request is answered that one of REFUSALS stopped."""
    if isinstance(error, KdCacheError):
        return _refused(request, error)
    if isinstance(error, RequestValidationError):
        return _misread(request, error)
    assert isinstance(error, HTTPException)
    return _stopped(request, error)


def _refused(request: Request, error: KdCacheError) -> JSONResponse:
    retry: int | None = getattr(error, "retry_after_s", None)
    return problem_response(
        request.scope,
        error.http_status,
        error.message,
        code=error.code,
        hint=error.hint,
        headers={"Retry-After": str(retry)} if retry is not None else None,
    )


def _misread(request: Request, error: RequestValidationError) -> JSONResponse:
    found = [_complaint(each) for each in error.errors()[:MAX_REPORTED]]
    return problem_response(request.scope, 422, "; ".join(found) + ".")


def _stopped(request: Request, error: HTTPException) -> JSONResponse:
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods_of(request))
    return problem_response(request.scope, error.status_code, str(error.detail), headers=headers)


def _methods_of(request: Request) -> list[str]:
    """Methods that some route has at this path. Starlette names those of the first route only."""
    found = []
    for method in METHODS:
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            found.append(method)
    return found


def _complaint(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    return f"{where}: {error['msg']}".replace("\n", " ").rstrip(".")


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


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
