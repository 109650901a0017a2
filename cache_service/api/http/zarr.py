"""The `Range` header: one range of bytes; anything else is answered with the whole. Pure.

Source: RFC 9110, section 14.

Which keys a cache has, and what is known of the object behind one before it is sent.

The objects of a cache as they are stored, for any Zarr library. Never a hole that reads as fill.

Zarr takes 404 for "nothing was written, use the fill value". So 404 is for keys that no cache has;
what should be there and is not, or is not whole, is an error that every reader raises.

A listing of a cache's nodes, for Zarr readers that want one: PROPFIND, as obstore asks.

It names groups and arrays, not chunks: a reader finds those by the array's own grid. Paths are
relative to the cache's address, because obstore 0.12 takes them so (WebDAV's are the server's).
Source: RFC 4918, section 9.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import quote
from xml.sax.saxutils import escape

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from cache_service.api.http.catalog import Served
from cache_service.api.http.problems import responses
from cache_service.api.http.rows import Need, immutable, matches, read_rows
from cache_service.api.http.service import Service, TheService
from cache_service.errors import CorruptError, NotACacheError, RowsNotBuiltError
from cache_service.format.canonical import canonical_json, sha256_hex
from cache_service.format.group import COMMITS_DOCUMENT, COMMITS_KEY, ROOT_KEY, encode_group
from cache_service.format.layout import (
    array_documents,
    head_arrays,
    head_key,
    object_key,
    row_arrays,
    witness_key,
)
from cache_service.format.shard import REPAIR
from cache_service.format.spec import CacheSpec
from cache_service.reader import Cache
from cache_service.reader_memory import NotAtHandError
from cache_service.storage import Storage


class BadRangeError(Exception):
    """No byte of the object lies in the range. Internal: the route answers 416."""


class Span(NamedTuple):
    """Bytes [start, stop)."""

    start: int
    stop: int


_ONE = re.compile(r"bytes=[ \t]*(\d{0,19})-(\d{0,19})[ \t]*", re.ASCII)


def parse_range(header: str | None, size: int) -> Span | None:
    """The bytes asked for; None for all of them.

    Raises:
        BadRangeError: the range is beyond the object's end.
    """
    asked = _ONE.fullmatch(header) if header is not None else None
    if asked is None or not (asked[1] or asked[2]):
        return None
    if not asked[1]:  # the last so many
        count = int(asked[2])
        if count == 0 or size == 0:
            raise BadRangeError
        return Span(max(size - count, 0), size)
    first = int(asked[1])
    last = int(asked[2]) if asked[2] else size - 1
    if asked[2] and last < first:
        return None  # not a range at all
    if first >= size:
        raise BadRangeError
    return Span(first, min(last + 1, size))


_SHARD_OBJECT = re.compile(r"([a-z_]{1,32})/c/(0|[1-9]\d{0,9})/(0|[1-9]\d{0,9})(?:/0)*", re.ASCII)
_COMMIT = re.compile(r"commits/(0|[1-9]\d{0,9})/(0|[1-9]\d{0,9})\.json", re.ASCII)


class NoSuchKeyError(NotACacheError):
    """No cache of this kind has such a key."""

    code = "no_such_key"


class Found(NamedTuple):
    """An object that may be sent.

    Attributes:
        content: of a small one, checked; None where the bytes are to be read from `storage`.
        is_immutable: whether it may be kept for ever.
    """

    storage: Storage
    key: str
    size: int
    etag: str
    media_type: str
    is_immutable: bool
    content: bytes | None


class Place(NamedTuple):
    """A key that is a shard's: of one of its arrays, or its commit."""

    kind: Literal["object", "commit"]
    name: str
    seed: int
    shard: int


def shard_of_key(key: str) -> Place | None:
    """The shard that a key belongs to; None for metadata and for what is no key at all."""
    found = _SHARD_OBJECT.fullmatch(key)
    if found is not None:
        return Place("object", found[1], int(found[2]), int(found[3]))
    found = _COMMIT.fullmatch(key)
    return None if found is None else Place("commit", "", int(found[1]), int(found[2]))


def find(served: Served, key: str) -> Found:
    """The object behind a key.

    Raises:
        NoSuchKeyError: no cache with this spec has that key.
        RowsNotBuiltError: it is of a shard that is not recorded.
        CorruptError: it should be there, and is missing, of another size, or not what was written.
    """
    place = shard_of_key(key)
    if place is None or place.name in head_arrays(served.cache.spec):
        return _metadata(served, key)
    spec = served.cache.spec
    if place.shard >= spec.num_shards:
        raise _no_such_key(key)
    if place.kind == "commit":
        return _commit(served, key, place)
    if object_keys(spec, place.seed, place.shard).get(place.name) != key:
        raise _no_such_key(key)
    commit = served.cache.commit(place.seed, place.shard)
    table = commit.objects[place.name]
    storage = served.cache.storage
    served.refuse_links(key)
    size = storage.size(key)
    if size != table.size:
        raise CorruptError(
            f"{served.name}/{key} has {size or 0} bytes, but {table.size} were committed.",
            hint=REPAIR,
        )
    tag = [commit.fingerprint, key, size, table.index_crc32c, table.checksums.tolist()]
    return Found(
        storage, key, size, _etag(canonical_json(tag)), "application/octet-stream", True, None
    )


def object_keys(spec: CacheSpec, seed: int, shard: int) -> dict[str, str]:
    """Keys of a shard's objects by array name, the witnesses' among them."""
    keys = {array.name: object_key(array, seed, shard) for array in row_arrays(spec)}
    return keys | {"witness": witness_key(seed, shard)}


def _commit(served: Served, key: str, place: Place) -> Found:
    served.refuse_links(key)
    content = served.cache.storage.get(key)
    if content is None:
        raise MissingCommitError(
            f"shard {place.shard} of seed {place.seed} of {served.name} is not recorded."
        )
    served.cache.commit(place.seed, place.shard)
    return _small(served, key, content, is_immutable=False)


class MissingCommitError(NotACacheError):
    """A commit was asked for by its own key; that there is none is an answer, and no hole."""

    code = RowsNotBuiltError.code


def _metadata(served: Served, key: str) -> Found:
    cache = served.cache
    shapes = head_arrays(cache.spec)
    heads = {head_key(name, shape): name for name, shape in shapes.items()}
    if key in heads:
        served.refuse_links(key)
        cache.head()  # checks every one of them
        content = cache.storage.get(key) or b""
        return _small(served, key, content, is_immutable=True)
    if key not in documents_of(cache.spec):
        raise _no_such_key(key)
    served.refuse_links(key)
    content = cache.storage.get(key) or b""
    if not _is_as_written(cache, key, content):
        raise CorruptError(
            f"{served.name}/{key} is missing or does not describe this cache.",
            hint="Run the same `kd-cache build` again: it writes the metadata anew.",
        )
    return _small(served, key, content, is_immutable=False)


def documents_of(spec: CacheSpec) -> set[str]:
    """Keys of the metadata documents of a cache."""
    return {ROOT_KEY, COMMITS_KEY, *(f"{name}/zarr.json" for name in array_documents(spec, 1))}


def _is_as_written(cache: Cache, key: str, content: bytes) -> bool:
    if key == ROOT_KEY:
        return content == encode_group(cache.group)
    if key == COMMITS_KEY:
        return content == COMMITS_DOCUMENT
    try:
        # The seed axis of a row array; any number does for one that has none.
        num_seeds = int(json.loads(content)["shape"][0])
        wanted = array_documents(cache.spec, num_seeds)[key.removesuffix("/zarr.json")]
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        return False
    return content == canonical_json(wanted)


def _small(served: Served, key: str, content: bytes, *, is_immutable: bool) -> Found:
    kind = "application/json" if key.endswith(".json") else "application/octet-stream"
    return Found(
        served.cache.storage, key, len(content), _etag(content), kind, is_immutable, content
    )


def _etag(content: bytes) -> str:
    return f'"{sha256_hex(content)[:32]}"'


def _no_such_key(key: str) -> NoSuchKeyError:
    return NoSuchKeyError(f"no cache has a key {key[:200]!r}.")


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


_LISTING = ["PROPFIND"]

NO_DATE = "Thu, 01 Jan 1970 00:00:00 GMT"
"""Nothing stored holds a date, and a reader of listings wants one."""


@router.api_route(
    "/v1/caches/{name}/zarr/{key:path}", methods=["PROPFIND"], include_in_schema=False
)
@router.api_route("/v1/caches/{name}/zarr", methods=["PROPFIND"], include_in_schema=False)
async def listing(request: Request, service: TheService, name: str, key: str = "") -> Response:
    """The nodes at and below a key: one level of them, or all with `Depth: infinity`."""
    prefix = f"{key.strip('/')}/" if key.strip("/") else ""

    def sizes() -> dict[str, int]:
        served = service.catalog.open(name)
        storage = served.cache.storage
        return {
            each: storage.size(each) or 0
            for each in sorted(documents_of(served.cache.spec))
            if each.startswith(prefix)
        }

    found = await service.gate.read(request, sizes)
    if not found:
        raise NoSuchKeyError(f"no cache has keys below {key[:200]!r}.")
    deep = request.headers.get("depth", "infinity") not in ("0", "1")
    entries = [_entry(f"/{prefix}", None)]
    folders = set()
    for each, size in found.items():
        folder, nested, _ = each.removeprefix(prefix).partition("/")
        if deep or not nested:
            entries.append(_entry(f"/{each}", size))
        elif folder not in folders:
            folders.add(folder)
            entries.append(_entry(f"/{prefix}{folder}/", None))
    body = f'<?xml version="1.0"?><D:multistatus xmlns:D="DAV:">{"".join(entries)}</D:multistatus>'
    return Response(body, 207, media_type="application/xml")


def _entry(path: str, size: int | None) -> str:
    kind = "<D:collection/>" if size is None else ""
    length = "" if size is None else f"<D:getcontentlength>{size}</D:getcontentlength>"
    return (
        f"<D:response><D:href>{escape(quote(path))}</D:href><D:propstat><D:prop>"
        f"<D:getlastmodified>{NO_DATE}</D:getlastmodified>{length}"
        f"<D:resourcetype>{kind}</D:resourcetype></D:prop>"
        "<D:status>HTTP/1.1 200 OK</D:status></D:propstat></D:response>"
    )
