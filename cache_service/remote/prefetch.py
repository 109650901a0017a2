"""Which ranges of rows to request from a server, and fetching the next one in the background."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import NamedTuple

from cachetools import LRUCache

from cache_service.errors import KdCacheError, RowsNotBuiltError
from cache_service.format.codecs import Arrays, RowArray
from cache_service.format.spec import CacheSpec
from cache_service.interrupts import StoppedWaitingError

MAX_REQUEST_BYTES = 8 << 20
MAX_REQUEST_ROWS = 4096
"""Limits of one request. Larger requests are not faster, and a server may refuse them."""


class Span(NamedTuple):
    """Recorded positions [start, stop) of a seed, and the names of the arrays to read."""

    seed: int
    start: int
    stop: int
    names: tuple[str, ...]


def rows_per_request(arrays: tuple[RowArray, ...]) -> int:
    """The largest number of rows of these arrays in one request."""
    fitting = MAX_REQUEST_BYTES // sum(array.row_bytes for array in arrays)
    return max(1, min(fitting, MAX_REQUEST_ROWS))


def exact_spans(span: Span, step: int) -> list[Span]:
    """Splits a span into parts of at most `step` rows."""
    return [
        span._replace(start=low, stop=min(low + step, span.stop))
        for low in range(span.start, span.stop, step)
    ]


def aligned_spans(span: Span, step: int, spec: CacheSpec) -> list[Span]:
    """The aligned pieces of `step` rows that a span touches; none crosses a shard's edge.

    Every batch size uses the same pieces, so a disk cache of them is reused; and a piece depends on
    one shard only, so that waiting for it waits for nothing else.
    """
    spans, position = [], span.start
    while position < span.stop:
        first, end = spec.shard_range(position // spec.layout.shard_rows)
        low = first + (position - first) // step * step
        position = min(low + step, end)
        spans.append(span._replace(start=low, stop=position))
    return spans


class StridePredictor:
    """Predicts the next range from the previous ones.

    A loader worker reads every n-th batch, and the distance between its ranges shows n. The first
    prediction assumes consecutive ranges; later ones only what was observed.
    """

    def __init__(self) -> None:
        self._last: Span | None = None
        self._stride = 0

    def next_after(self, span: Span) -> Span | None:
        """The range expected after this one, or None if there is no basis for a prediction."""
        size, last = span.stop - span.start, self._last
        if last is not None and last.seed == span.seed:
            stride = span.start - last.start
        else:
            stride = self._stride or size
        confirmed = self._stride in (0, stride)
        self._last, self._stride = span, stride
        if not confirmed or stride <= 0:
            return None
        return span._replace(start=span.start + stride, stop=span.stop + stride)


Fetch = Callable[[Span], Arrays]


class _BackgroundFetch:
    """One fetch in a thread, usable in the process that started it."""

    def __init__(self, span: Span, fetch: Fetch) -> None:
        self.span = span
        self.process = os.getpid()
        self._result: Arrays | KdCacheError | None = None
        self._fetch = fetch
        self._thread = threading.Thread(target=self._run, name="kd-cache-prefetch", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether another fetch may start. Threads do not survive a fork."""
        return self.process != os.getpid() or not self._thread.is_alive()

    def is_for(self, span: Span) -> bool:
        """Whether this fetch delivers that span in this process."""
        return self.span == span and self.process == os.getpid()

    def result(self) -> Arrays | None:
        """The rows, or None if they have to be requested again. Raises what the fetch raised."""
        self._thread.join()
        if isinstance(self._result, RowsNotBuiltError):
            return None  # the background request does not wait for rows; the foreground one does
        if isinstance(self._result, KdCacheError):
            raise self._result
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._fetch(self.span)
        except KdCacheError as error:
            self._result = error
        except StoppedWaitingError:
            pass  # the thread that needs the rows stops by itself


class Prefetcher:
    """Fetches spans, one of them in advance, and keeps the `max_kept` last ones. For one thread."""

    def __init__(self, max_kept: int) -> None:
        self._kept: LRUCache[Span, Arrays] = LRUCache(max_kept)
        self._pending: _BackgroundFetch | None = None

    def get(self, span: Span, fetch: Fetch) -> Arrays:
        """The rows of a span: kept, being fetched, or fetched now."""
        rows: Arrays | None = self._kept.get(span)
        if rows is None and self._pending is not None and self._pending.is_for(span):
            pending, self._pending = self._pending, None
            rows = pending.result()
        if rows is None:
            rows = fetch(span)
        if self._kept.maxsize:
            self._kept[span] = rows
        return rows

    def start(self, span: Span, fetch: Fetch) -> None:
        """Begins to fetch a span in the background, unless another fetch is running."""
        if span in self._kept:
            return
        if self._pending is None or (self._pending.is_done and not self._pending.is_for(span)):
            self._pending = _BackgroundFetch(span, fetch)
