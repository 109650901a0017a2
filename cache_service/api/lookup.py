"""Rows of given samples under a seed, in request order.

Shape letters: B samples asked for.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from cache_service.api.answers import (
    FRAME,
    check_json,
    check_size,
    chosen_arrays,
    refuse_large,
    rows_response,
    split_names,
    wants_json,
)
from cache_service.api.catalog import Served
from cache_service.api.problems import RequestError, TooLargeError, responses
from cache_service.api.queries import (
    LookupQuery,
    Wait,
    misread,
    parameters,
    read_query,
    service_behind,
)
from cache_service.api.reading import Need, read_rows
from cache_service.format.frame import lookup_metadata
from cache_service.format.frozen import Frozen
from cache_service.format.seeds import MAX_SEED

router = APIRouter(tags=["rows"])

OCTETS = "application/octet-stream"

Number = Annotated[int, Field(ge=0, le=MAX_SEED, strict=True)]


class LookupRequest(Frozen):
    """Which samples' rows.

    Attributes:
        seed: which recorded epoch.
        samples: numbers in the dataset, in any order, also twice.
        arrays: their names; all by default.
        wait: so many seconds, for rows of a build that runs.
    """

    seed: Number
    samples: Annotated[list[Number], Field(min_length=1)]
    arrays: Annotated[list[str], Field(min_length=1, max_length=64)] | None = None
    wait: Wait = 0.0


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": LookupRequest.model_json_schema()},
            OCTETS: {
                "schema": {
                    "type": "string",
                    "format": "binary",
                    "description": "int32 little-endian samples; the rest is in the query.",
                }
            },
        },
    }
}


PATH = "/v1/caches/{name}/lookup"


@router.post(
    PATH,
    response_class=Response,
    responses={200: FRAME, **responses(404, 413, 415, 503)},
    openapi_extra={"parameters": parameters(LookupQuery), **_BODY},
)
async def lookup(request: Request) -> Response:
    """Rows of samples under a seed, in request order; the seed is in the query or the body."""
    service = service_behind(request)
    asked, samples_B = await _asked(request, read_query(LookupQuery, request))
    if len(samples_B) > service.config.limits.max_rows:
        raise TooLargeError(
            f"{len(samples_B)} samples were asked for; one answer has "
            f"{service.config.limits.max_rows} rows at most.",
            hint="Ask in several requests.",
        )
    as_json = wants_json(request)

    def read(served: Served, at_hand: bool) -> Response:
        cache = served.cache
        arrays = chosen_arrays(cache.arrays, asked.arrays)
        num_bytes = check_size(service, arrays, len(samples_B))
        if as_json:
            check_json(len(samples_B))
        metadata = lookup_metadata(cache.fingerprint, asked.seed, len(samples_B))
        refuse_large(num_bytes, at_hand=at_hand)
        names = tuple(array.name for array in arrays)
        found = served.lookup_rows(asked.seed, samples_B, names, at_hand=at_hand)
        headers = {"Cache-Control": "no-store"}
        return rows_response(arrays, found, metadata, headers, as_json=as_json)

    def shards_of(served: Served) -> list[int]:
        return served.shards_of_samples(asked.seed, samples_B)

    need = Need(request.path_params["name"], asked.seed, shards_of, asked.wait)
    answer = await read_rows(service, request, need, read)
    service.metrics.rows.inc(len(samples_B))
    return answer


class _Asked(NamedTuple):
    """A lookup, without its samples."""

    seed: int
    arrays: list[str] | None
    wait: float


async def _asked(request: Request, query: LookupQuery) -> tuple[_Asked, NDArray[np.int64]]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    if kind == OCTETS:
        if query.seed is None:
            raise RequestError("query.seed: missing; a binary body holds samples only.")
        return _Asked(query.seed, split_names(query.arrays), query.wait), _samples_of(body)
    if kind != "application/json":
        raise UnsupportedBodyError(
            f"a body of {kind[:64]!r} was sent.", hint=f"Send application/json or {OCTETS}."
        )
    if query.model_fields_set:
        raise RequestError("a JSON body says all that is asked for; the query is for binary ones.")
    try:
        told = LookupRequest.model_validate_json(body)
    except ValidationError as refused:
        raise misread("body", refused) from refused
    return _Asked(told.seed, told.arrays, told.wait), np.array(told.samples, np.int64)


def _samples_of(body: bytes) -> NDArray[np.int64]:
    if not body or len(body) % 4:
        raise RequestError(
            f"the body has {len(body)} bytes; it holds int32 little-endian samples, one at least."
        )
    samples_B = np.frombuffer(body, "<i4").astype(np.int64)
    if samples_B.min() < 0:
        raise RequestError(f"sample {int(samples_B.min())} was asked for; samples begin at 0.")
    return samples_B


class UnsupportedBodyError(RequestError):
    """A body of a type that is not read."""

    code = "unsupported_media_type"
    http_status = 415
