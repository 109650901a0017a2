"""Queries of the routes that answer rows, read in one go.

FastAPI solves each parameter of a route by itself, which takes as long as copying 256 rows does. So
these routes take the request, and describe their parameters here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError

from cache_service.api.problems import MAX_REPORTED, RequestError
from cache_service.api.service import Service
from cache_service.format.frozen import Frozen
from cache_service.format.seeds import MAX_SEED

MAX_FIELDS = 16

Seed = Annotated[int, Field(ge=0, le=MAX_SEED, description="Which recorded epoch.")]
Position = Annotated[int, Field(ge=0, le=MAX_SEED, description="Recorded position.")]
Names = Annotated[
    str | None,
    Field(max_length=1024, description="Arrays, with commas between them; all by default."),
]
Wait = Annotated[
    float, Field(ge=0, le=86400, description="Seconds to wait for rows of a build that runs.")
]


class RowsQuery(Frozen):
    """Recorded positions [start, stop) of a seed."""

    seed: Seed
    start: Position
    stop: Position
    arrays: Names = None
    wait: Wait = 0.0


class LookupQuery(Frozen):
    """What is asked of the samples in a binary body. A JSON body says it all itself."""

    seed: Seed | None = None
    arrays: Names = None
    wait: Wait = 0.0


QueryT = TypeVar("QueryT", bound=Frozen)


def read_query(kind: type[QueryT], request: Request) -> QueryT:
    """The query of a request.

    Raises:
        RequestError, RequestValidationError: it is not of that kind.
    """
    found: QueryT = _read(kind, request.scope["query_string"])
    return found


@lru_cache(maxsize=256)  # a trainer asks for the same again; what is read does not change
def _read(kind: type[QueryT], query: bytes) -> QueryT:
    text = query.decode("latin-1")
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as refused:
        raise RequestError("the query has too many fields.") from refused
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise RequestError("the query says a thing twice.")
    try:
        return kind.model_validate_strings(fields)
    except ValidationError as refused:
        raise misread("query", refused) from refused


def misread(where: str, refused: ValidationError) -> RequestValidationError:
    """What pydantic found, as FastAPI would have."""
    found = refused.errors(include_url=False)[:MAX_REPORTED]
    return RequestValidationError([{**each, "loc": (where, *each["loc"])} for each in found])


def parameters(kind: type[Frozen]) -> list[dict[str, Any]]:
    """How OpenAPI describes the cache's name in the path, and a query."""
    schema = kind.model_json_schema()
    required = schema.get("required", ())
    told: list[dict[str, Any]] = [
        {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    for name, field in schema["properties"].items():
        told.append({"name": name, "in": "query", "required": name in required, "schema": field})
    return told


def service_behind(request: Request) -> Service:
    """The service, without a dependency to be solved."""
    service: Service = request.app.state.service
    return service
