"""Rows in a response: one safetensors document, the same bytes from every server. No I/O.

The header of a frame follows from the request, so a client computes it and compares: a response
with other arrays, shapes, types or positions is refused before a value of it is used. safetensors
has no checksum of its own; that of the whole body is sent in the HTTP header `CHECKSUM_HEADER`.

Shape letters: B rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from cache_service.errors import CorruptError
from cache_service.format.canonical import Buffer, crc32c
from cache_service.format.codecs import Arrays, RowArray

MEDIA_TYPE = "application/vnd.safetensors"

CHECKSUM_HEADER = "kd-cache-crc32c"
"""HTTP header with the CRC-32C of the body, 8 hexadecimal digits."""

_LENGTH_BYTES = 8
_ALIGNMENT = 8

_DTYPES = {
    "float16": "F16",
    "float32": "F32",
    "int32": "I32",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}


def range_metadata(fingerprint: str, seed: int, start: int, stop: int) -> dict[str, str]:
    """`__metadata__` of a frame of the recorded positions [start, stop)."""
    return {
        "fingerprint": fingerprint,
        "seed": str(seed),
        "start": str(start),
        "stop": str(stop),
    }


def lookup_metadata(fingerprint: str, seed: int, num_rows: int) -> dict[str, str]:
    """`__metadata__` of a frame with the rows of a lookup, in request order."""
    return {"fingerprint": fingerprint, "seed": str(seed), "rows": str(num_rows)}


def frame_header(arrays: Sequence[RowArray], num_rows: int, metadata: Mapping[str, str]) -> bytes:
    """Everything before the values: 8 bytes of length, JSON, spaces up to a multiple of 8."""
    return _frame_header(tuple(arrays), num_rows, tuple(metadata.items()))


@lru_cache(maxsize=512)  # many lookups of one size under one seed have the same header
def _frame_header(
    arrays: tuple[RowArray, ...], num_rows: int, metadata: tuple[tuple[str, str], ...]
) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for array in arrays:
        end = offset + num_rows * array.row_bytes
        entries[array.name] = {
            "dtype": _DTYPES[array.dtype],
            "shape": [num_rows, *array.row_shape],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def values_size(arrays: Sequence[RowArray], num_rows: int) -> int:
    """Bytes of a frame after its header."""
    return num_rows * sum(array.row_bytes for array in arrays)


def checksum_of(*pieces: Buffer) -> str:
    """The value of `CHECKSUM_HEADER` for a body, whole or in pieces."""
    return f"{crc32c(*pieces):08x}"


def decode_frame(
    body: bytes,
    *,
    checksum: str | None,
    arrays: Sequence[RowArray],
    num_rows: int,
    metadata: Mapping[str, str],
    what: str,
) -> Arrays:
    """The rows of a frame, each array [B, ...], read-only views of `body`.

    `checksum` is the value of its `CHECKSUM_HEADER`, None where there is none; `arrays`, `num_rows`
    and `metadata` are those of the request, and `what` names it in messages.

    Raises:
        CorruptError: it does not answer the request, or was damaged on the way.
    """
    header = frame_header(arrays, num_rows, metadata)
    expected = len(header) + values_size(arrays, num_rows)
    if len(body) != expected:
        raise CorruptError(f"{what} returned {len(body)} bytes; {expected} were expected.")
    if checksum is None or checksum_of(body) != checksum:
        raise CorruptError(
            f"{what}: the body has CRC-32C {checksum_of(body)}, its header says "
            f"{checksum or 'nothing'}: it was damaged on the way."
        )
    if body[: len(header)] != header:
        raise CorruptError(f"{what} returned other arrays or rows than were requested.")
    rows: Arrays = {}
    offset = len(header)
    for array in arrays:
        count = num_rows * array.row_bytes
        flat = np.frombuffer(body, np.uint8, count=count, offset=offset)
        dtype = np.dtype(array.dtype).newbyteorder("<")
        rows[array.name] = flat.view(dtype).reshape(num_rows, *array.row_shape)
        offset += count
    return rows
