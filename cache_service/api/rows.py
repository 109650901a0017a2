"""A range of recorded positions: one answer that never changes, so caches may keep it."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cache_service.api.answers import (
    FRAME,
    Frame,
    check_json,
    check_size,
    chosen_arrays,
    entity_tag,
    frame_response,
    matches,
    refuse_large,
    split_names,
    wants_json,
)
from cache_service.api.catalog import Served
from cache_service.api.problems import RequestError, responses
from cache_service.api.queries import RowsQuery, parameters, read_query, service_behind
from cache_service.api.reading import Need, read_rows
from cache_service.api.service import Service
from cache_service.format.frame import frame_header, range_metadata
from cache_service.format.layout import RowArray
from cache_service.reader import Cache

router = APIRouter(tags=["rows"])

AHEAD_BYTES = 4 << 20
"""Who reads a range reads the next one: its chunks are checked in the same visit to a thread."""


@router.head("/v1/caches/{name}/rows", response_class=Response, include_in_schema=False)
@router.get(
    "/v1/caches/{name}/rows",
    response_class=Response,
    responses={200: FRAME, 304: {"description": "Not Modified"}, **responses(404, 413, 503)},
    openapi_extra={"parameters": parameters(RowsQuery)},
)
async def rows(request: Request) -> Response:
    """Rows of the recorded positions [start, stop) of a seed, in the order of the recording."""
    service = service_behind(request)
    seed, start, stop, names, wait = _asked(read_query(RowsQuery, request))
    as_json = wants_json(request)

    def read(served: Served, at_hand: bool) -> Response:
        cache = served.cache
        arrays = chosen_arrays(cache.arrays, split_names(names))
        num_bytes = check_size(service, arrays, stop - start)
        if as_json:
            check_json(stop - start)
        chosen = tuple(array.name for array in arrays)
        etag = entity_tag(cache.fingerprint, seed, start, stop, chosen, as_json)
        headers = {"ETag": etag, "Cache-Control": immutable(service)}
        if at_hand and not as_json:
            answer = _as_it_lies(cache, arrays, (seed, start, stop), headers)
        else:
            refuse_large(num_bytes, at_hand=at_hand)
            metadata = range_metadata(cache.fingerprint, seed, start, stop)
            frame = Frame(arrays, stop - start, metadata)
            cache.read_into(seed, start, stop, frame.places, at_hand=at_hand)
            answer = frame.response(headers, as_json=as_json)
        if not at_hand:
            cache.check_ahead(seed, stop, chosen, AHEAD_BYTES)
        return Response(status_code=304, headers=headers) if matches(request, etag) else answer

    def shards_of(served: Served) -> range:
        size = served.cache.spec.layout.shard_rows
        return range(start // size, (stop - 1) // size + 1)

    answer = await read_rows(
        service, request, Need(request.path_params["name"], seed, shards_of, wait), read
    )
    if answer.status_code == 200:
        service.metrics.rows.inc(stop - start)
    return answer


def _as_it_lies(
    cache: Cache, arrays: Sequence[RowArray], span: tuple[int, int, int], headers: dict[str, str]
) -> Response:
    """The range out of the maps themselves: nothing is copied, and no whole chunk summed again.

    Raises:
        NotAtHandError: a part of it is not mapped, or not checked yet.
    """
    seed, start, stop = span
    header = frame_header(arrays, stop - start, range_metadata(cache.fingerprint, *span))
    parts = {array.name: cache.pieces(seed, start, stop, array.name) for array in arrays}
    return frame_response(arrays, parts, header, headers, mapped=True)


def _asked(query: RowsQuery) -> tuple[int, int, int, str | None, float]:
    if query.stop <= query.start:
        raise RequestError(f"positions [{query.start}, {query.stop}) are asked for: there is none.")
    return query.seed, query.start, query.stop, query.arrays, query.wait


def immutable(service: Service) -> str:
    """`Cache-Control` of what never changes. Behind tokens, no proxy may share it."""
    who = "private" if service.config.tokens else "public"
    return f"{who}, max-age=31536000, immutable"
