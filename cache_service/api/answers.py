"""Answers with rows: which arrays, how many at most, their ETag, and the bytes or the JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from cache_service.api.limits import COPIED_BYTES
from cache_service.api.problems import RequestError, TooLargeError
from cache_service.api.service import Service
from cache_service.format.canonical import Buffer, canonical_json, sha256_hex
from cache_service.format.frame import (
    CHECKSUM_HEADER,
    MEDIA_TYPE,
    blank_frame,
    frame_header,
    values_size,
)
from cache_service.format.joined import joined_crc32c
from cache_service.format.layout import RowArray
from cache_service.reader_memory import NotAtHandError, Rows

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
