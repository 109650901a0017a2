"""Queries of the routes that answer rows, read in one go.

FastAPI solves each parameter of a route by itself, which takes as long as copying 256 rows does. So
these routes take the request, and describe their parameters here.

Answers with rows: which arrays, how many at most, their ETag, and the bytes or the JSON.

Reading rows for a request: on a thread, and again when a running build has recorded them.

A range of recorded positions: one answer that never changes, so caches may keep it.

Rows of given samples under a seed, in request order.

Shape letters: B samples asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

import numpy as np
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from starlette.types import Receive, Scope, Send

from cache_service.api.http.catalog import Served
from cache_service.api.http.limits import COPIED_BYTES
from cache_service.api.http.problems import MAX_REPORTED, RequestError, TooLargeError, responses
from cache_service.api.http.service import Service
from cache_service.api.http.waiting import RowsAwaitedError
from cache_service.errors import RowsNotBuiltError
from cache_service.format.canonical import Buffer, canonical_json, sha256_hex
from cache_service.format.frame import (
    CHECKSUM_HEADER,
    MEDIA_TYPE,
    blank_frame,
    frame_header,
    lookup_metadata,
    range_metadata,
    values_size,
)
from cache_service.format.frozen import Frozen
from cache_service.format.joined import joined_crc32c
from cache_service.format.layout import RowArray
from cache_service.format.seeds import MAX_SEED
from cache_service.reader import Cache
from cache_service.reader_memory import NotAtHandError, Rows

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


MAX_JSON_ROWS = 64
"""JSON is for eyes; programs read frames."""

MAX_LOOP_BYTES = 2 << 20
"""Copying and summing so much takes a millisecond at most."""

JOINED_BYTES = 16 << 10
"""Pieces below this are joined: copying 16 KiB takes less than handing on one more piece."""

FRAME = {
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
"""How OpenAPI describes an answer with rows."""


def chosen_arrays(known: tuple[RowArray, ...], names: Sequence[str] | None) -> tuple[RowArray, ...]:
    """The arrays asked for, in the order in which the cache has them.

    Raises:
        RequestError: one that the cache does not have, or none at all.
    """
    if names is None:
        return known
    unknown = sorted(set(names) - {array.name for array in known})
    if unknown or not names:
        asked = f"array {unknown[0][:64]!r} was" if unknown else "no array was"
        listed = ", ".join(array.name for array in known)
        raise RequestError(f"{asked} asked for; this cache has {listed}.")
    return tuple(array for array in known if array.name in names)


def split_names(names: str | None) -> list[str] | None:
    """`a,b` as a list."""
    return None if names is None else names.split(",")


def check_size(service: Service, arrays: Sequence[RowArray], num_rows: int) -> int:
    """Bytes of an answer. What is more than one may hold is refused, before memory is taken.

    Raises:
        TooLargeError: too many rows, or too many bytes.
    """
    limits = service.config.limits
    row_bytes = values_size(arrays, 1)
    most = max(1, min(limits.max_rows, limits.max_response_bytes // row_bytes))
    if num_rows > most:
        raise TooLargeError(
            f"{num_rows} rows of {row_bytes} bytes were asked for; one answer has {most} at most.",
            hint=f"Ask for up to {most} rows at a time.",
        )
    return num_rows * row_bytes


def refuse_large(num_bytes: int, *, at_hand: bool) -> None:
    """Leave to a thread what would hold up the event loop, at hand or not."""
    if at_hand and num_bytes > MAX_LOOP_BYTES:
        raise NotAtHandError


def wants_json(request: Request) -> bool:
    """Whether the client takes JSON and not a frame."""
    accept = request.headers.get("accept", "")
    return "application/json" in accept and MEDIA_TYPE not in accept


def check_json(num_rows: int) -> None:
    """Refuse JSON of many rows.

    Raises:
        RequestError: more than there are eyes for.
    """
    if num_rows > MAX_JSON_ROWS:
        raise RequestError(
            f"{num_rows} rows were asked for as JSON, which is for up to {MAX_JSON_ROWS}.",
            hint=f"Ask with `Accept: {MEDIA_TYPE}`.",
        )


def entity_tag(*parts: object) -> str:
    """A strong ETag of what identifies an answer."""
    return f'"{sha256_hex(canonical_json(parts))[:32]}"'


def matches(request: Request, etag: str) -> bool:
    """Whether the client has this answer already (`If-None-Match`)."""
    known = request.headers.get("if-none-match")
    if known is None:
        return False
    return known.strip() == "*" or etag in {
        tag.strip().removeprefix("W/") for tag in known.split(",")
    }


class Frame:
    """Rows on their way out: memory for them with the header before it, filled in place.

    Attributes:
        places: in it each array, one element a row.
    """

    def __init__(
        self, arrays: Sequence[RowArray], num_rows: int, metadata: Mapping[str, str]
    ) -> None:
        self._arrays = arrays
        self._metadata = metadata
        header = frame_header(arrays, num_rows, metadata)
        self._bytes, self.places = blank_frame(arrays, num_rows, header)

    def response(self, headers: Mapping[str, str], *, as_json: bool) -> Response:
        """The filled frame with its checksum, or what it says as JSON."""
        if as_json:
            return json_response(self._arrays, self.places, self._metadata, headers)
        return FrameResponse([(self._bytes.data, None)], headers)


class FrameResponse(Response):
    """A frame in pieces that are handed on one by one, so that nothing is copied to join them.

    Each piece comes with its CRC-32C where that is known. Those in maps take no memory.
    """

    def __init__(
        self,
        pieces: Sequence[tuple[Buffer, int | None]],
        headers: Mapping[str, str],
        *,
        mapped: bool = False,
    ) -> None:
        self._pieces = pieces
        num_bytes = sum(len(piece) for piece, _ in pieces)
        joined = sum(len(piece) for piece, _ in pieces if isinstance(piece, bytes))
        self._copied = joined if mapped else num_bytes
        told = {
            **headers,
            CHECKSUM_HEADER: f"{joined_crc32c(pieces):08x}",
            "Content-Length": str(num_bytes),
            "Vary": "Accept",
        }
        super().__init__(headers=told, media_type=MEDIA_TYPE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send it; to HEAD, what comes before it."""
        scope.setdefault("state", {})[COPIED_BYTES] = self._copied
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        pieces = [b""] if scope["method"] == "HEAD" else [piece for piece, _ in self._pieces]
        last = len(pieces) - 1
        for number, piece in enumerate(pieces):
            more = number < last
            await send({"type": "http.response.body", "body": piece, "more_body": more})


def rows_response(
    arrays: Sequence[RowArray],
    rows: Mapping[str, Rows],
    metadata: Mapping[str, str],
    headers: Mapping[str, str],
    *,
    as_json: bool,
) -> Response:
    """Rows that are in memory already, as a frame or as JSON."""
    if as_json:
        return json_response(arrays, rows, metadata, headers)
    parts = {name: [(content.view(np.uint8).data, None)] for name, content in rows.items()}
    num_rows = len(rows[arrays[0].name])
    return frame_response(arrays, parts, frame_header(arrays, num_rows, metadata), headers)


def frame_response(
    arrays: Sequence[RowArray],
    parts: Mapping[str, Sequence[tuple[Buffer, int | None]]],
    header: bytes,
    headers: Mapping[str, str],
    *,
    mapped: bool = False,
) -> Response:
    """The pieces of all arrays behind the header; small ones are joined."""
    pieces: list[tuple[Buffer, int | None]] = [(header, None)]
    for array in arrays:
        for piece, known in parts[array.name]:
            last = pieces[-1][0]
            if len(piece) < JOINED_BYTES and len(last) < JOINED_BYTES:
                pieces[-1] = (b"".join((last, piece)), None)
            else:
                pieces.append((piece, known))
    return FrameResponse(pieces, headers, mapped=mapped)


def json_response(
    arrays: Sequence[RowArray],
    rows: Mapping[str, Rows],
    metadata: Mapping[str, str],
    headers: Mapping[str, str],
) -> Response:
    """What a frame would say, for eyes."""
    told: dict[str, Any] = {}
    for array in arrays:
        flat = rows[array.name].view(np.dtype(array.dtype).newbyteorder("<"))
        told[array.name] = _plain(flat.reshape(-1, *array.row_shape).tolist())
    return JSONResponse({**metadata, "arrays": told}, headers={**headers, "Vary": "Accept"})


def _plain(value: Any) -> Any:
    """Nested lists with null where a number is not finite: JSON has no NaN."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Result = TypeVar("Result")


class Need(NamedTuple):
    """What a request reads.

    Attributes:
        name: of the cache.
        seed: of the rows.
        shards_of: the shards that the rows lie in, worked out without reading any.
        wait_s: how long the client waits for them, in seconds.
    """

    name: str
    seed: int
    shards_of: Callable[[Served], Sequence[int]]
    wait_s: float


async def read_rows(
    service: Service, request: Request, need: Need, read: Callable[[Served, bool], Result]
) -> Result:
    """What `read` makes of the cache, as soon as the rows that it needs are recorded.

    It is tried here first with what is at hand: mapped and checked. That is a copy of microseconds,
    where a thread costs more than the copy. What touches storage goes to a thread.

    Args:
        service: whose caches.
        request: whose client may go away.
        need: which rows.
        read: is given the cache, and whether only what is at hand may be used; raises
            NotAtHandError if that is not enough.

    Raises:
        NotACacheError: there is no such cache.
        RowsNotBuiltError: nobody planned the rows.
        RowsAwaitedError: they are planned, and were not recorded in time.
        CorruptError: stored bytes are not those committed.
    """

    def first() -> Result:
        return read(service.catalog.open(need.name), False)

    with suppress(NotAtHandError):
        return read(service.catalog.at_hand(need.name), True)
    try:
        return await service.gate.read(request, first)
    except RowsNotBuiltError as refusal:
        shards = await service.gate.read(request, _planned, service, need, refusal)
        if not await service.waiter.wait_while_connected(
            request, need.name, need.seed, shards, need.wait_s
        ):
            raise RowsAwaitedError(
                refusal.message, hint="They are planned: ask again, or let the request wait."
            ) from refusal
    return await service.gate.read(request, first)


def _planned(service: Service, need: Need, refusal: RowsNotBuiltError) -> list[int]:
    """The shards to wait for; the refusal again where nobody planned them."""
    served = service.catalog.open(need.name)
    shards = list(need.shards_of(served))
    inside = all(0 <= shard < served.cache.spec.num_shards for shard in shards)
    if not shards or not inside or need.seed >= served.cache.num_seeds():
        raise refusal
    return shards


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
    seed, start, stop, names, wait = _read_range(read_query(RowsQuery, request))
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


def _read_range(query: RowsQuery) -> tuple[int, int, int, str | None, float]:
    if query.stop <= query.start:
        raise RequestError(f"positions [{query.start}, {query.stop}) are asked for: there is none.")
    return query.seed, query.start, query.stop, query.arrays, query.wait


def immutable(service: Service) -> str:
    """`Cache-Control` of what never changes. Behind tokens, no proxy may share it."""
    who = "private" if service.config.tokens else "public"
    return f"{who}, max-age=31536000, immutable"


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
    asked, samples_B = await _read_lookup(request, read_query(LookupQuery, request))
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


class _Lookup(NamedTuple):
    """A lookup, without its samples."""

    seed: int
    arrays: list[str] | None
    wait: float


async def _read_lookup(request: Request, query: LookupQuery) -> tuple[_Lookup, NDArray[np.int64]]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    if kind == OCTETS:
        if query.seed is None:
            raise RequestError("query.seed: missing; a binary body holds samples only.")
        return _Lookup(query.seed, split_names(query.arrays), query.wait), _samples_of(body)
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
    return _Lookup(told.seed, told.arrays, told.wait), np.array(told.samples, np.int64)


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
