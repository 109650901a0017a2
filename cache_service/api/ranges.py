"""The `Range` header: one range of bytes; anything else is answered with the whole. Pure.

Source: RFC 9110, section 14.
"""

from __future__ import annotations

import re
from typing import NamedTuple


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
