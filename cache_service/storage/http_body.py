"""Reads the body of a response: complete, within a limit and a deadline, as the server sent it.

Proxies that buffer, scan or compress pass a body on in chunks, without a length, or compressed.
That is undone here; whether the body was damaged on the way, its checksum tells.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping

from urllib3.response import BaseHTTPResponse

PIECE_BYTES = 1 << 20

_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": 0}
"""For zlib, by content coding. 0 takes the window's size from the header of the stream."""


class InvalidBodyError(Exception):
    """The body is not one that is accepted. Internal: the client turns it into its own error."""


class IncompleteBodyError(Exception):
    """The body ends too early. Internal, as above."""


def read_body(
    response: BaseHTTPResponse, headers: Mapping[str, str], *, limit: int, deadline: float
) -> bytes:
    """Read a body and undo what proxies did to it.

    Args:
        response: whose headers have arrived.
        headers: of the response, names in lower case.
        limit: largest accepted body, in bytes, as received and as decoded.
        deadline: in the time of `time.monotonic`.

    Raises:
        InvalidBodyError: it is too long, or encoded in an unknown way.
        IncompleteBodyError: it ends before its stated length.
        TimeoutError: it is not complete at the deadline.
    """
    size = _stated_size(headers)
    if size is not None and size > limit:
        raise InvalidBodyError(f"a response of {size} bytes where at most {limit} were expected")
    decode = _decoder(headers, limit)
    # In pieces as they arrive: a stated length is not allocated in advance, and the deadline is
    # checked however slowly the bytes come.
    pieces, total = [], 0
    for piece in _pieces(response, size, deadline):
        pieces.append(decode(piece) if decode else piece)
        total += len(pieces[-1])
        if total > limit:
            raise InvalidBodyError(f"a response of more than {limit} bytes, which is too long")
    if decode is not None:
        decode(b"")
    return b"".join(pieces)


def _stated_size(headers: Mapping[str, str]) -> int | None:
    """The length that the headers state; None for a body in chunks or until the connection ends."""
    transfer, stated = headers.get("transfer-encoding"), headers.get("content-length")
    if transfer is not None and transfer.strip().lower() != "chunked":
        raise InvalidBodyError(f"a response in the transfer coding {transfer[:40]!r}")
    if transfer is not None or stated is None:
        return None
    if not (stated.isascii() and stated.isdigit() and len(stated) <= 18):
        raise InvalidBodyError(f"a response of the length {stated[:40]!r}")
    return int(stated)


def _pieces(response: BaseHTTPResponse, size: int | None, deadline: float) -> Iterator[bytes]:
    left = size
    while left is None or left:
        piece = response.read1(PIECE_BYTES if left is None else min(left, PIECE_BYTES))
        if not piece:
            if left is not None:
                raise IncompleteBodyError(f"a response that ends {left} bytes too early")
            break
        if time.monotonic() > deadline:
            raise TimeoutError
        left = None if left is None else left - len(piece)
        yield piece
    if not size:
        response.drain_conn()  # marks the response as read, so that its socket can be reused


def _decoder(headers: Mapping[str, str], limit: int) -> Callable[[bytes], bytes] | None:
    """A function that decodes piece after piece; b"" asks whether the stream was complete."""
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding in ("identity", ""):
        return None
    if coding not in _WINDOW_BITS:
        raise InvalidBodyError(
            f"a response compressed as {coding[:40]!r}, which was not requested and is not known"
        )
    stream = zlib.decompressobj(_WINDOW_BITS[coding])

    def decode(piece: bytes) -> bytes:
        if not piece and not stream.eof:
            raise IncompleteBodyError("a compressed response that ends too early")
        try:
            # One byte more than is accepted, so that the caller notices what is too long.
            return stream.decompress(piece, limit + 1)
        except zlib.error as problem:
            raise InvalidBodyError(f"a response that is not {coding} as stated") from problem

    return decode
