"""Which ranges to ask a server for, and which one comes next. Pure."""

from __future__ import annotations

from typing import NamedTuple

from cache_service.format.layout import RowArray
from cache_service.format.spec import CacheSpec

MAX_REQUEST_BYTES = 8 << 20
MAX_REQUEST_ROWS = 4096
"""Of one request. Larger ones are no faster, and a server may refuse them."""


class Span(NamedTuple):
    """Recorded positions [start, stop) of a seed, and which arrays of them."""

    seed: int
    start: int
    stop: int
    names: tuple[str, ...]


def rows_per_request(arrays: tuple[RowArray, ...]) -> int:
    """How many rows of these arrays are asked for at a time, at most."""
    fitting = MAX_REQUEST_BYTES // sum(array.row_bytes for array in arrays)
    return max(1, min(fitting, MAX_REQUEST_ROWS))


def exact_spans(wanted: Span, step: int) -> list[Span]:
    """The very range, in parts of at most `step` rows."""
    return [
        wanted._replace(start=low, stop=min(low + step, wanted.stop))
        for low in range(wanted.start, wanted.stop, step)
    ]


def piece_spans(wanted: Span, step: int, spec: CacheSpec) -> list[Span]:
    """The pieces that a range touches. They lie at fixed places and never cross a shard's edge.

    So any batch size finds the same pieces, and a piece waits for one shard only.
    """
    spans, position = [], wanted.start
    while position < wanted.stop:
        first, end = spec.shard_range(position // spec.layout.shard_rows)
        low = first + (position - first) // step * step
        position = min(low + step, end)
        spans.append(wanted._replace(start=low, stop=position))
    return spans


class Stride:
    """Foresees the next range from the last ones.

    A worker of a loader reads every n-th batch; how far apart those are shows in what it asks. One
    guess is made blindly, that ranges follow each other, and then only what was seen is expected.
    """

    def __init__(self) -> None:
        self._last: Span | None = None
        self._stride = 0

    def after(self, span: Span) -> Span | None:
        """The range expected after this one; None where there is none, or nothing to go by."""
        size, last = span.stop - span.start, self._last
        if last is not None and last.seed == span.seed:
            stride = span.start - last.start
        else:
            stride = self._stride or size
        known = self._stride in (0, stride)
        self._last, self._stride = span, stride
        if not known or stride <= 0:
            return None
        return span._replace(start=span.start + stride, stop=span.stop + stride)
