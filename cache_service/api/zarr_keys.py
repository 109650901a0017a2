"""The objects of a cache as they are stored, for any Zarr library. Never a hole that reads as fill.

Zarr takes 404 for "nothing was written, use the fill value". So 404 is for keys that no cache has;
what should be there and is not, or is not whole, is an error that every reader raises.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from cache_service.api.answers import matches
from cache_service.api.catalog import Served
from cache_service.api.objects import Found, find, shard_of_key
from cache_service.api.problems import responses
from cache_service.api.ranges import BadRangeError, Span, parse_range
from cache_service.api.reading import Need, read_rows
from cache_service.api.rows import immutable
from cache_service.api.service import Service, TheService
from cache_service.errors import CorruptError
from cache_service.reader_memory import NotAtHandError

router = APIRouter(tags=["zarr"])

PIECE_BYTES = 1 << 20
"""What is in memory of an object that is sent whole."""

_RAW: dict[str, Any] = {
    "description": "The object's bytes.",
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {"schema": {"type": "object"}},
    },
}


@router.head("/v1/caches/{name}/zarr/{key:path}", response_class=Response, include_in_schema=False)
@router.get(
    "/v1/caches/{name}/zarr/{key:path}",
    response_class=Response,
    responses={
        200: _RAW,
        206: _RAW | {"description": "The bytes that were asked for."},
        304: {"description": "Not Modified"},
        **responses(404, 412, 416, 503),
    },
)
async def zarr_key(
    request: Request,
    service: TheService,
    name: str,
    key: Annotated[str, Path(description="As in the stored Zarr group.")],
) -> Response:
    """One stored object, whole or a range of it."""
    place = shard_of_key(key)
    seed, shard = (place.seed, place.shard) if place else (0, -1)
    need = Need(name, seed, lambda _: [shard], 0.0)
    found = await read_rows(service, request, need, partial(_find, key))
    headers = {
        "ETag": found.etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": immutable(service) if found.is_immutable else "no-cache",
    }
    if request.headers.get("if-match") not in (None, "*", found.etag):
        raise HTTPException(412, "the object is not the one that you know.", headers)
    if matches(request, found.etag):
        return Response(status_code=304, headers=headers)
    whole = Span(0, found.size)
    try:
        span = _asked_range(request, found)
    except BadRangeError:
        told = {**headers, "Content-Range": f"bytes */{found.size}"}
        raise HTTPException(416, f"the object has {found.size} bytes.", told) from None
    status = 200
    if span is not None:
        status = 206
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{found.size}"
    span = span or whole
    headers["Content-Length"] = str(span.stop - span.start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=found.media_type)
    if span.stop - span.start <= PIECE_BYTES:
        content = await service.gate.read(request, _read, found, span)
        return Response(content, status, headers, found.media_type)
    pieces = _pieces(service, request, found, span)
    return StreamingResponse(pieces, status, headers, found.media_type)


def _find(key: str, served: Served, at_hand: bool) -> Found:
    if at_hand:
        raise NotAtHandError
    return find(served, key)


def _asked_range(request: Request, found: Found) -> Span | None:
    if request.headers.get("if-range") not in (None, found.etag):
        return None
    return parse_range(request.headers.get("range"), found.size)


async def _pieces(
    service: Service, request: Request, found: Found, span: Span
) -> AsyncIterator[bytes]:
    for start in range(span.start, span.stop, PIECE_BYTES):
        piece = Span(start, min(start + PIECE_BYTES, span.stop))
        # An error here cuts the answer short of its Content-Length: nobody takes it for whole.
        yield await service.gate.read(request, _read, found, piece)


def _read(found: Found, span: Span) -> bytes:
    if found.content is not None:
        return found.content[span.start : span.stop]
    content = (found.storage.get_ranges(found.key, [span]) or [b""])[0]
    if len(content) != span.stop - span.start:
        raise CorruptError(f"{found.key} of {found.storage.url} is cut short.")
    return content
