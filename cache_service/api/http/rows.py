"""Rows over HTTP: ranges of recorded positions, and lookups of samples.

Both routes work the same way. The request is parsed. If its rows are ready (mapped and checked),
they are read on the event loop, otherwise on a thread; rows that are planned but not recorded yet
are waited for. The response is one safetensors document, with the CRC-32C of the body in a header.

Shape letters: B requested samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from starlette.types import Receive, Scope, Send

from cache_service.api.http.catalog import OpenCache
from cache_service.api.http.limits import COPIED_BYTES
from cache_service.api.http.problems import MAX_REPORTED, RequestError, TooLargeError, responses
from cache_service.api.http.service import Service
from cache_service.api.http.waiting import RowsAwaitedError
from cache_service.config import Frozen
from cache_service.errors import RowsNotBuiltError, SpecMismatchError
from cache_service.format.canonical import Buffer, canonical_json, joined_crc32c, sha256_hex
from cache_service.format.codecs import Arrays, RowArray
from cache_service.format.frame import (
    CHECKSUM_HEADER,
    MEDIA_TYPE,
    frame_header,
    lookup_metadata,
    range_metadata,
    values_size,
)
from cache_service.format.seeds import MAX_SEED

router = APIRouter(tags=["rows"])

MAX_JSON_ROWS = 64
"""JSON is for people; programs read safetensors."""

MAX_QUERY_FIELDS = 16

MAX_LOOP_BYTES = 2 << 20
"""Copying and summing 2 MiB takes a millisecond; larger lookups do not block the event loop."""

PREFETCH_BYTES = 4 << 20
"""Bytes of each array that are checked behind a range on the same visit to a thread, because
whoever reads a range reads the next one."""

JOINED_BYTES = 16 << 10
"""Smaller pieces are joined: copying 16 KiB takes less time than sending one more piece."""

OCTETS = "application/octet-stream"

Result = TypeVar("Result")
QueryT = TypeVar("QueryT", bound=Frozen)

Seed = Annotated[int, Field(ge=0, le=MAX_SEED, description="Which recorded epoch.")]
Position = Annotated[int, Field(ge=0, le=MAX_SEED, description="Recorded position.")]
Number = Annotated[int, Field(ge=0, le=MAX_SEED, strict=True)]
Names = Annotated[
    str | None,
    Field(max_length=1024, description="Arrays, with commas between them; all by default."),
]
Wait = Annotated[
    float, Field(ge=0, le=86400, description="Seconds to wait for rows of a build that runs.")
]


FINGERPRINT = "^[0-9a-f]{64}$"
OF_CACHE = "Refuse any other cache; what is sent may then be kept for ever."


class RangeQuery(Frozen):
    """Recorded positions [start, stop) of a seed, of the cache with a fingerprint."""

    seed: Seed
    start: Position
    stop: Position
    arrays: Names = None
    wait: Wait = 0.0
    fingerprint: Annotated[str | None, Field(pattern=FINGERPRINT, description=OF_CACHE)] = None


class PlainRange(NamedTuple):
    """A `RangeQuery` that needs no further check."""

    seed: int
    start: int
    stop: int
    arrays: str | None
    wait: float
    fingerprint: str | None


class LookupQuery(Frozen):
    """A lookup with a binary body, which has only samples."""

    seed: Seed | None = None
    arrays: Names = None
    wait: Wait = 0.0


class LookupRequest(Frozen):
    """Which samples' rows.

    Attributes:
        seed: which recorded epoch.
        samples: numbers in the dataset, in any order, repeated or not.
        arrays: their names; all by default.
        wait: seconds to wait for rows of a build that runs.
    """

    seed: Number
    samples: Annotated[list[Number], Field(min_length=1)]
    arrays: Annotated[list[str], Field(min_length=1, max_length=64)] | None = None
    wait: Wait = 0.0


class UnsupportedBodyError(RequestError):
    """The content type of the body is not supported."""

    code = "unsupported_media_type"
    http_status = 415


def path_and_query(kind: type[Frozen]) -> list[dict[str, Any]]:
    """Describe the parameters of a route for OpenAPI.

    FastAPI would parse each parameter of a route by itself, which takes as long as copying 256
    rows; so these routes take the bare request, parse the query at once, and describe it here.
    """
    schema = kind.model_json_schema()
    required = schema.get("required", ())
    path = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return [path] + [
        {"name": name, "in": "query", "required": name in required, "schema": field}
        for name, field in schema["properties"].items()
    ]


_FRAME = {
    "description": "The rows as safetensors, or as JSON for up to 64 of them.",
    "headers": {
        CHECKSUM_HEADER: {
            "description": "CRC-32C of the body, 8 hexadecimal digits.",
            "schema": {"type": "string", "pattern": "^[0-9a-f]{8}$"},
        }
    },
    "content": {
        MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}},
        "application/json": {"schema": {"type": "object"}},
    },
}

_LOOKUP_BODY: dict[str, Any] = {
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


@router.get(
    "/v1/caches/{name}/rows",
    response_class=Response,
    responses={200: _FRAME, 304: {"description": "Not Modified"}, **responses(404, 409, 413, 503)},
    openapi_extra={"parameters": path_and_query(RangeQuery)},
)
async def rows(request: Request) -> Response:
    """Rows of the recorded positions [start, stop) of a seed, in the order of the recording."""
    service: Service = request.app.state.service
    query = plain_range(request.scope["query_string"]) or parse_query(RangeQuery, request)
    selected: dict[str, RowArray] = {}
    seed, start, stop = query.seed, query.start, query.stop
    if stop <= start:
        raise RequestError(f"`start` ({start}) must be smaller than `stop` ({stop}).")
    array_names = _split(query.arrays)
    as_json = _wants_json(request)

    def is_ready(opened: OpenCache) -> bool:
        selected.update(_select_arrays(service, opened, array_names, stop - start, as_json=as_json))
        return not as_json and opened.cache.is_ready(seed, start, stop, tuple(selected))

    def read(opened: OpenCache, ready: bool) -> Response:
        refuse_other_cache(opened, query.fingerprint)
        cache = opened.cache
        arrays = selected
        if not ready:  # the cache may be another one by now
            arrays = _select_arrays(service, opened, array_names, stop - start, as_json=as_json)
        names = tuple(arrays)
        kind = "json" if as_json else "rows"
        etag = f'"{cache.fingerprint[:32]}-{seed}-{start}-{stop}-{"+".join(names)}-{kind}"'
        headers = {
            "ETag": etag,
            "Cache-Control": cache_control(service, query.fingerprint is not None),
        }
        metadata = range_metadata(cache.fingerprint, seed, start, stop)
        if as_json:
            response = _json_response(
                cache.read(seed, start, stop, arrays=names), metadata, headers
            )
        else:
            header = frame_header(tuple(arrays.values()), stop - start, metadata)
            pieces: list[Piece] = [(header, None)]
            for name in names:
                pieces += cache.pieces(seed, start, stop, name)
            is_mapped = ready or cache.is_ready(seed, start, stop, names)
            response = FrameResponse(pieces, headers, is_mapped=is_mapped)
        if not ready:
            cache.prefetch(seed, stop, names, PREFETCH_BYTES)
        return Response(status_code=304, headers=headers) if matches(request, etag) else response

    def shards(opened: OpenCache) -> Sequence[int]:
        size = opened.cache.spec.layout.shard_rows
        return range(start // size, (stop - 1) // size + 1)

    recorded = Recorded(seed, shards, query.wait, is_ready)
    response = await read_recorded(service, request, recorded, read)
    if response.status_code == 200:
        service.metrics.rows.inc(stop - start)
    return response


@router.post(
    "/v1/caches/{name}/lookup",
    response_class=Response,
    responses={200: _FRAME, **responses(404, 413, 415, 503)},
    openapi_extra={
        "parameters": path_and_query(LookupQuery),
        "requestBody": _LOOKUP_BODY,
    },
)
async def lookup(request: Request) -> Response:
    """Rows of samples under a seed, in request order; the seed is in the query or the body."""
    service: Service = request.app.state.service
    seed, samples_B, array_names, wait_s = await _parse_lookup(request)
    as_json = _wants_json(request)

    def is_ready(opened: OpenCache) -> bool:
        arrays = _select_arrays(service, opened, array_names, len(samples_B), as_json=as_json)
        is_small = values_size(tuple(arrays.values()), len(samples_B)) <= MAX_LOOP_BYTES
        return is_small and opened.is_lookup_ready(seed, samples_B, tuple(arrays))

    def read(opened: OpenCache, _ready: bool) -> Response:
        arrays = _select_arrays(service, opened, array_names, len(samples_B), as_json=as_json)
        values = opened.lookup(seed, samples_B, tuple(arrays))
        metadata = lookup_metadata(opened.cache.fingerprint, seed, len(samples_B))
        headers = {"Cache-Control": "no-store"}
        if as_json:
            return _json_response(values, metadata, headers)
        header = frame_header(tuple(arrays.values()), len(samples_B), metadata)
        rows = [(values[name].reshape(-1).view(np.uint8).data, None) for name in arrays]
        return FrameResponse([(header, None), *rows], headers)

    def shards(opened: OpenCache) -> Sequence[int]:
        return opened.shards_of_samples(seed, samples_B)

    recorded = Recorded(seed, shards, wait_s, is_ready)
    response = await read_recorded(service, request, recorded, read)
    service.metrics.rows.inc(len(samples_B))
    return response


class Recorded(NamedTuple):
    """What a request reads.

    Attributes:
        seed: of the rows.
        shards: returns the shards that the rows lie in, without reading any.
        wait_s: how long the client waits for them, seconds.
        is_ready: returns whether reading would not block on storage.
    """

    seed: int
    shards: Callable[[OpenCache], Sequence[int]]
    wait_s: float
    is_ready: Callable[[OpenCache], bool]


async def read_recorded(
    service: Service,
    request: Request,
    recorded: Recorded,
    read: Callable[[OpenCache, bool], Result],
) -> Result:
    """Read from the cache that a request names, once the rows are recorded.

    Rows that are ready are read here, on the event loop: that takes microseconds, and a thread
    costs more (decision 012). Everything else is read on a thread.

    Args:
        service: whose caches.
        request: names the cache in its path; the client may close its connection.
        recorded: which rows.
        read: reads them. Its second argument says whether they were ready.

    Raises:
        NotACacheError: there is no such cache.
        RowsNotBuiltError: the rows are not planned.
        RowsAwaitedError: they are planned, but were not recorded in time.
        CorruptError: stored bytes differ from those committed.
    """
    name: str = request.path_params["name"]
    opened = service.catalog.if_open(name)
    if opened is not None and recorded.is_ready(opened):
        return read(opened, True)

    def read_from_storage() -> Result:
        return read(service.catalog.open(name), False)

    def planned_shards(refusal: RowsNotBuiltError) -> list[int]:
        opened = service.catalog.open(name)
        shards, cache = list(recorded.shards(opened)), opened.cache
        inside = all(0 <= shard < cache.spec.num_shards for shard in shards)
        if not shards or not inside or recorded.seed >= cache.num_seeds():
            raise refusal
        return shards

    try:
        return await service.limiter.read(request, read_from_storage)
    except RowsNotBuiltError as refusal:
        shards = await service.limiter.read(request, planned_shards, refusal)
        if not await service.waiter.wait_while_connected(
            request, name, recorded.seed, shards, recorded.wait_s
        ):
            place = await anyio.to_thread.run_sync(service.catalog.place, name, recorded.seed)
            place = place or "They are planned, but no build of this server records them now."
            raise RowsAwaitedError(
                f"{refusal.message} {place}",
                hint="Ask again, or let the request wait (`wait`; wait_s in a train file).",
            ) from refusal
    return await service.limiter.read(request, read_from_storage)


_PLAIN_RANGE = re.compile(
    rb"seed=(\d{1,9})&start=(\d{1,9})&stop=(\d{1,9})"
    rb"(?:&arrays=([a-z_]{1,64}(?:,[a-z_]{1,64}){0,15}))?(?:&fingerprint=([0-9a-f]{64}))?"
)


def plain_range(text: bytes) -> PlainRange | None:
    """The query as this project's clients write it, in a tenth of the time; None for others."""
    found = _PLAIN_RANGE.fullmatch(text)
    if found is None:
        return None
    arrays, fingerprint = found[4], found[5]
    return PlainRange(
        seed=int(found[1]),
        start=int(found[2]),
        stop=int(found[3]),
        arrays=None if arrays is None else arrays.decode(),
        wait=0.0,
        fingerprint=None if fingerprint is None else fingerprint.decode(),
    )


def parse_query(kind: type[QueryT], request: Request) -> QueryT:
    """Parse and check the query of a request. Raises RequestError, RequestValidationError."""
    text = request.scope["query_string"].decode("latin-1")
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS)
    except ValueError as error:
        raise RequestError("the query has too many fields.") from error
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise RequestError("the query has a field twice.")
    try:
        return kind.model_validate_strings(fields)
    except ValidationError as error:
        raise _request_error("query", error) from error


def _request_error(where: str, error: ValidationError) -> RequestValidationError:
    """Convert pydantic's error to the one that FastAPI raises for a route's own parameters."""
    found = error.errors(include_url=False)[:MAX_REPORTED]
    return RequestValidationError([{**each, "loc": (where, *each["loc"])} for each in found])


async def _parse_lookup(
    request: Request,
) -> tuple[int, NDArray[np.int64], list[str] | None, float]:
    """Parse seed, samples, names of arrays and seconds to wait from the query and the body."""
    query = parse_query(LookupQuery, request)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    if content_type == OCTETS:
        if query.seed is None:
            raise RequestError("query.seed: missing; a binary body has only samples.")
        return query.seed, _parse_samples(body), _split(query.arrays), query.wait
    if content_type != "application/json":
        raise UnsupportedBodyError(
            f"the body has the content type {content_type[:64]!r}.",
            hint=f"Send application/json or {OCTETS}.",
        )
    if query.model_fields_set:
        raise RequestError("a JSON body takes no query: put every field into the body.")
    try:
        document = LookupRequest.model_validate_json(body)
    except ValidationError as error:
        raise _request_error("body", error) from error
    samples_B = np.array(document.samples, np.int64)
    return document.seed, samples_B, document.arrays, document.wait


def _parse_samples(body: bytes) -> NDArray[np.int64]:
    if not body or len(body) % 4:
        raise RequestError(
            f"the body has {len(body)} bytes; it must be one or more int32 little-endian samples."
        )
    samples_B = np.frombuffer(body, "<i4").astype(np.int64)
    if samples_B.min() < 0:
        raise RequestError(f"sample {int(samples_B.min())} is negative; samples begin at 0.")
    return samples_B


def _split(names: str | None) -> list[str] | None:
    return None if names is None else names.split(",")


def _wants_json(request: Request) -> bool:
    accept = request.headers.get("accept", "")
    return "application/json" in accept and MEDIA_TYPE not in accept


def _select_arrays(
    service: Service,
    opened: OpenCache,
    names: Sequence[str] | None,
    num_rows: int,
    *,
    as_json: bool,
) -> dict[str, RowArray]:
    """Select the requested arrays in the cache's order, and check how large the response would be.

    Raises:
        RequestError: no array or an unknown one is requested, or too many rows as JSON.
        TooLargeError: too many rows, or too many bytes.
    """
    arrays, limits = opened.cache.layout.by_name, service.limits
    if names is not None:
        unknown = sorted(set(names) - arrays.keys())
        if unknown or not names:
            requested = f"array {unknown[0][:64]!r} was" if unknown else "no array was"
            raise RequestError(f"{requested} requested; this cache has {', '.join(arrays)}.")
        arrays = {name: array for name, array in arrays.items() if name in names}
    row_bytes = values_size(tuple(arrays.values()), 1)
    max_rows = max(1, min(limits.max_rows, limits.max_response_bytes // row_bytes))
    if num_rows > max_rows:
        raise TooLargeError(
            f"{num_rows} rows of {row_bytes} bytes were requested; one response has {max_rows} at "
            "most.",
            hint=f"Request up to {max_rows} rows at a time.",
        )
    if as_json and num_rows > MAX_JSON_ROWS:
        raise RequestError(
            f"{num_rows} rows were requested as JSON, which is for up to {MAX_JSON_ROWS}.",
            hint=f"Send `Accept: {MEDIA_TYPE}`.",
        )
    return arrays


def entity_tag(*parts: object) -> str:
    """Return a strong ETag of what identifies a response."""
    return f'"{sha256_hex(canonical_json(parts))[:32]}"'


def matches(request: Request, etag: str) -> bool:
    """Whether the client has this response already (`If-None-Match`)."""
    known = request.headers.get("if-none-match")
    if known is None:
        return False
    tags = {tag.strip().removeprefix("W/") for tag in known.split(",")}
    return known.strip() == "*" or etag in tags


def refuse_other_cache(opened: OpenCache, fingerprint: str | None) -> None:
    """Raise SpecMismatchError if a request names the fingerprint of another cache."""
    found = opened.cache.fingerprint
    if fingerprint not in (None, found):
        raise SpecMismatchError(
            f"cache {opened.name!r} has fingerprint {found} here, and the request is for "
            f"{fingerprint}: the server holds another cache under this name.",
            hint="Serve each cache under a name of its own.",
        )


def cache_control(service: Service, is_immutable: bool) -> str:
    """Return the `Cache-Control` of recorded bytes. Behind tokens, no proxy may share them.

    They never change, but another cache may take the place of this one. So they may be kept without
    asking again only under an address that names the cache by its fingerprint.
    """
    has_tokens = bool(service.config.tokens)
    if not is_immutable:
        return "private, no-cache" if has_tokens else "no-cache"
    return f"{'private' if has_tokens else 'public'}, max-age=31536000, immutable"


Piece = tuple[Buffer, int | None]
"""A part of a body, and its CRC-32C if that is known."""


class FrameResponse(Response):
    """A safetensors document in pieces that are sent one by one, so that large ones are not copied.

    Args:
        pieces: in order. Small ones are joined here.
        headers: besides those of the document itself.
        is_mapped: the large pieces lie in memory maps; they do not count as memory of the process.
    """

    def __init__(
        self, pieces: Sequence[Piece], headers: Mapping[str, str], *, is_mapped: bool = False
    ) -> None:
        self._pieces = [pieces[0]]
        for piece, checksum in pieces[1:]:
            last = self._pieces[-1][0]
            if len(piece) < JOINED_BYTES and len(last) < JOINED_BYTES:
                self._pieces[-1] = (b"".join((last, piece)), None)
            else:
                self._pieces.append((piece, checksum))
        num_bytes = sum(len(piece) for piece, _ in self._pieces)
        joined = sum(len(piece) for piece, _ in self._pieces if isinstance(piece, bytes))
        self._copied_bytes = joined if is_mapped else num_bytes
        self.status_code = 200
        self.background = None
        # Made here: Starlette's own constructor takes longer than copying 64 rows.
        self.raw_headers = [
            (b"content-type", MEDIA_TYPE.encode()),
            (b"content-length", b"%d" % num_bytes),
            (b"vary", b"Accept"),
            (CHECKSUM_HEADER.encode(), b"%08x" % joined_crc32c(self._pieces)),
            *((name.lower().encode(), value.encode()) for name, value in headers.items()),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send it; a HEAD request gets its headers only."""
        scope.setdefault("state", {})[COPIED_BYTES] = self._copied_bytes
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        bodies = [b""] if scope["method"] == "HEAD" else [piece for piece, _ in self._pieces]
        for number, body in enumerate(bodies, 1):
            more = number < len(bodies)
            await send({"type": "http.response.body", "body": body, "more_body": more})


class ViewResponse(Response):
    """Bytes that lie in a memory map, sent as they are."""

    def __init__(
        self, body: memoryview, status: int, headers: Mapping[str, str], media_type: str
    ) -> None:
        self._view = body
        super().__init__(None, status, headers, media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send it."""
        scope.setdefault("state", {})[COPIED_BYTES] = 0
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._view})


def _json_response(
    values: Arrays, metadata: Mapping[str, str], headers: Mapping[str, str]
) -> Response:
    # A safetensors header holds text only; besides the fingerprint, its values are numbers.
    facts = {key: text if key == "fingerprint" else int(text) for key, text in metadata.items()}
    arrays = {name: _exact(rows) for name, rows in values.items()}
    return JSONResponse({**facts, "arrays": arrays}, headers={**headers, "Vary": "Accept"})


def _exact(values: NDArray[Any]) -> Any:
    """Nested lists that no JSON reader rounds.

    Integers of 64 bits are text, because JavaScript and others read numbers as float64, which is
    exact up to 2**53 only. Numbers that are not finite are null: JSON has none.
    """
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
        return values.astype(str).tolist()
    return _without_nan(values.tolist())


def _without_nan(value: Any) -> Any:
    """Replace numbers that are not finite by null in nested lists: JSON has no NaN."""
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
