"""The stored objects of a cache, so that any Zarr library can open its URL.

Zarr takes 404 for "nothing was written, use the fill value". So 404 is for keys that no cache has;
an object that should exist and is missing or not whole is an error that every reader raises.

`GET` answers one object or a range of it (RFC 9110, section 14). HTTP has no listing that every
library understands, so the root document is sent with consolidated metadata: it names the arrays.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import Field
from starlette.exceptions import HTTPException

from cache_service.api.http.catalog import OpenCache
from cache_service.api.http.mapped import MappedObject
from cache_service.api.http.problems import responses
from cache_service.api.http.rows import (
    FINGERPRINT,
    OF_CACHE,
    Recorded,
    ViewResponse,
    cache_control,
    matches,
    parse_query,
    path_and_query,
    read_recorded,
    refuse_other_cache,
)
from cache_service.api.http.service import Service
from cache_service.config import Frozen
from cache_service.errors import CorruptError, NotACacheError, RowsNotBuiltError
from cache_service.format.canonical import canonical_json, sha256_hex
from cache_service.format.group import ROOT_KEY, encode_group
from cache_service.format.layout import described_seeds
from cache_service.format.shard import REPAIR
from cache_service.rows.reader import Cache
from cache_service.storage import Storage

router = APIRouter(tags=["zarr"])

PIECE_BYTES = 1 << 20
"""Larger objects are read and sent in pieces of this size."""

_SHARD_OBJECT = re.compile(r"([a-z_]{1,32})/c/(0|[1-9]\d{0,9})/(0|[1-9]\d{0,9})(?:/0)*", re.ASCII)
_COMMIT = re.compile(r"commits/(0|[1-9]\d{0,9})/(0|[1-9]\d{0,9})\.json", re.ASCII)
_ONE_RANGE = re.compile(r"bytes=[ \t]*(\d{0,19})-(\d{0,19})[ \t]*", re.ASCII)

KEY_PARAMETER = {
    "name": "key",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": "As in the stored Zarr group.",
}


class ObjectQuery(Frozen):
    """The query of a stored object."""

    fingerprint: Annotated[str | None, Field(pattern=FINGERPRINT, description=OF_CACHE)] = None


_OBJECT: dict[str, Any] = {
    "description": "The object's bytes.",
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {"schema": {"type": "object"}},
    },
}


@router.get(
    "/v1/caches/{name}/zarr/{key:path}",
    response_class=Response,
    responses={
        200: _OBJECT,
        206: _OBJECT | {"description": "The requested bytes."},
        304: {"description": "Not Modified"},
        **responses(404, 409, 412, 416, 503),
    },
    openapi_extra={"parameters": [*path_and_query(ObjectQuery), KEY_PARAMETER]},
)
async def zarr_key(request: Request) -> Response:
    """One stored object, whole or a range of it."""
    service: Service = request.app.state.service
    name, key = request.path_params["name"], request.path_params["key"]
    fingerprint = parse_query(ObjectQuery, request).fingerprint
    opened = service.catalog.if_open(name)
    mapped = None if opened is None else opened.mapped_object(key)
    if opened is not None and mapped is not None:
        refuse_other_cache(opened, fingerprint)
        stored: StoredObject = mapped.stored
    else:
        mapped, stored = await _find_stored(service, request, key, fingerprint)
    headers = {
        "ETag": stored.etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": cache_control(service, stored.is_immutable and fingerprint is not None),
    }
    if request.headers.get("if-match") not in (None, "*", stored.etag):
        raise HTTPException(412, "the object does not have the ETag of If-Match.", headers)
    if matches(request, stored.etag):
        return Response(status_code=304, headers=headers)
    span, status = _requested(request, stored, headers)
    headers["Content-Length"] = str(span.stop - span.start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=stored.media_type)
    if mapped is not None:
        if not mapped.is_ready(*span):
            await service.limiter.read(request, mapped.touch, *span)
        return ViewResponse(mapped.view(*span), status, headers, stored.media_type)
    if span.stop - span.start <= PIECE_BYTES:
        content = await service.limiter.read(request, _read, stored, span)
        return Response(content, status, headers, stored.media_type)
    pieces = _pieces(service, request, stored, span)
    return StreamingResponse(pieces, status, headers, stored.media_type)


async def _find_stored(
    service: Service, request: Request, key: str, fingerprint: str | None
) -> tuple[MappedObject[StoredObject] | None, StoredObject]:
    """Find an object in storage, and map it where that is possible."""
    place = shard_of_key(key)
    seed, shard = (place.seed, place.shard) if place else (0, -1)
    recorded = Recorded(seed, lambda _: [shard], wait_s=0.0, is_ready=lambda _: False)

    def read(
        opened: OpenCache, _ready: bool
    ) -> tuple[MappedObject[StoredObject] | None, StoredObject]:
        refuse_other_cache(opened, fingerprint)
        stored = find(opened, key)
        mapped = opened.map_object(key, stored) if stored.content is None else None
        return mapped, stored

    return await read_recorded(service, request, recorded, read)


def _requested(request: Request, stored: StoredObject, headers: dict[str, str]) -> tuple[Span, int]:
    """The requested bytes and the status; adds to the headers. Raises HTTPException (416)."""
    if request.headers.get("if-range") in (None, stored.etag):
        try:
            span = parse_range(request.headers.get("range"), stored.size)
        except BadRangeError:
            headers["Content-Range"] = f"bytes */{stored.size}"
            raise HTTPException(416, f"the object has {stored.size} bytes.", headers) from None
        if span is not None:
            headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{stored.size}"
            return span, 206
    return Span(0, stored.size), 200


async def _pieces(
    service: Service, request: Request, stored: StoredObject, span: Span
) -> AsyncIterator[bytes]:
    for start in range(span.start, span.stop, PIECE_BYTES):
        piece = Span(start, min(start + PIECE_BYTES, span.stop))
        # An error here leaves the response shorter than its Content-Length, which clients notice.
        yield await service.limiter.read(request, _read, stored, piece)


def _read(stored: StoredObject, span: Span) -> bytes:
    if stored.content is not None:
        return stored.content[span.start : span.stop]
    content = (stored.storage.get_ranges(stored.key, [span]) or [b""])[0]
    if len(content) != span.stop - span.start:
        raise CorruptError(f"{stored.key} of {stored.storage.url} is cut short.")
    return content


class BadRangeError(Exception):
    """No byte of the object lies in the range. Internal: the route answers with 416."""


class Span(NamedTuple):
    """Bytes [start, stop)."""

    start: int
    stop: int


def parse_range(header: str | None, size: int) -> Span | None:
    """Parse a `Range` header with one range of bytes; None (send the whole) for any other header.

    Raises:
        BadRangeError: the range lies beyond the object's end.
    """
    match = _ONE_RANGE.fullmatch(header) if header is not None else None
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:  # a suffix: the last bytes
        count = int(match[2])
        if count == 0 or size == 0:
            raise BadRangeError
        return Span(max(size - count, 0), size)
    first = int(match[1])
    last = int(match[2]) if match[2] else size - 1
    if match[2] and last < first:
        return None  # invalid, so it is ignored
    if first >= size:
        raise BadRangeError
    return Span(first, min(last + 1, size))


class NoSuchKeyError(NotACacheError):
    """No cache of this kind has such a key."""

    code = "no_such_key"


class MissingCommitError(NotACacheError):
    """A commit was requested by its own key. It is no Zarr array, so 404 reads as no fill value."""

    code = RowsNotBuiltError.code


class StoredObject(NamedTuple):
    """A checked object.

    Attributes:
        content: of a small object; None if the bytes have to be read from `storage`.
        is_immutable: whether clients may keep it for ever.
    """

    storage: Storage
    key: str
    size: int
    etag: str
    is_immutable: bool
    content: bytes | None

    @property
    def media_type(self) -> str:
        """For the Content-Type header."""
        is_json = self.key.endswith(".json")
        return "application/json" if is_json else "application/octet-stream"


class ShardKey(NamedTuple):
    """A key of a shard: an object of the array `name`, or its commit (`name` is empty)."""

    name: str
    seed: int
    shard: int


def shard_of_key(key: str) -> ShardKey | None:
    """The shard that a key belongs to; None for metadata and for anything else."""
    match = _SHARD_OBJECT.fullmatch(key)
    if match is not None:
        return ShardKey(match[1], int(match[2]), int(match[3]))
    match = _COMMIT.fullmatch(key)
    return None if match is None else ShardKey("", int(match[1]), int(match[2]))


def find(opened: OpenCache, key: str) -> StoredObject:
    """Find and check the object of a key.

    Raises:
        NoSuchKeyError: no cache with this spec has that key.
        MissingCommitError, RowsNotBuiltError: its shard is not recorded.
        CorruptError: it is missing, has another size, or is not what was written.
    """
    cache, layout, storage = opened.cache, opened.cache.layout, opened.cache.storage
    place = shard_of_key(key)
    head_keys = layout.head_keys().values()
    if place is None or place.name in layout.heads:
        place, is_key = None, key in head_keys or key in documents_of(cache)
    else:
        is_key = place.shard < layout.spec.num_shards
        if place.name:
            is_key &= key == layout.object_keys(place.seed, place.shard).get(place.name)
    if not is_key:
        raise NoSuchKeyError(f"no cache has a key {key[:200]!r}.")
    opened.refuse_links(key)
    if place is not None and place.name:
        return _shard_object(opened, key, place)
    content = storage.get(key)
    if place is not None:
        if content is None:
            raise MissingCommitError(
                f"shard {place.shard} of seed {place.seed} of {opened.name} is not recorded."
            )
        cache.commit(place.seed, place.shard)  # checks it
    elif key in head_keys:
        cache.head()  # checks all of its arrays
    else:
        content = _document(opened, key, content)
    content = content or b""
    return StoredObject(storage, key, len(content), _etag(content), key in head_keys, content)


def _shard_object(opened: OpenCache, key: str, place: ShardKey) -> StoredObject:
    commit = opened.cache.commit(place.seed, place.shard)
    table, storage = commit.objects[place.name], opened.cache.storage
    size = storage.size(key)
    if size != table.size:
        raise CorruptError(
            f"{opened.name}/{key} has {size or 0} bytes, but {table.size} were committed.",
            hint=REPAIR,
        )
    identity = [commit.fingerprint, key, size, table.index_crc32c, table.checksums.tolist()]
    return StoredObject(storage, key, size, _etag(canonical_json(identity)), True, None)


def documents_of(cache: Cache) -> set[str]:
    """Keys of the metadata documents of a cache."""
    return {ROOT_KEY, *cache.layout.documents(1)}


def _document(opened: OpenCache, key: str, content: bytes | None) -> bytes:
    """Check a metadata document against the cache, and return it as it is sent.

    Raises:
        CorruptError: it is missing, or is not what was written.
    """
    group, layout = opened.cache.group, opened.cache.layout
    if key == ROOT_KEY:
        # The seed axis grows while a build runs, so the stored root document has no other ones.
        axis = layout.seed_axis_keys()[0]
        num_seeds = described_seeds(_document(opened, axis, opened.cache.storage.get(axis)))
        sent = encode_group(group, num_seeds)
        expected = {encode_group(group), sent}
    else:
        # The seed axis of a row array; for other documents the number does not matter.
        sent = layout.documents(described_seeds(content))[key]
        expected = {sent}
    if content not in expected:
        raise CorruptError(
            f"{opened.name}/{key} is missing or does not describe this cache.",
            hint="Run the same `kd-cache build` again: it rewrites the metadata.",
        )
    return sent


def _etag(content: bytes) -> str:
    return f'"{sha256_hex(content)[:32]}"'
