"""Rows from a server or from the disk, each answer checked. Safe to use from two threads.

Shape letters: B rows.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import CorruptError
from cache_service.format.codecs import Arrays
from cache_service.format.frame import (
    CHECKSUM_HEADER,
    MEDIA_TYPE,
    checksum_of,
    frame_header,
    lookup_metadata,
    range_metadata,
    values_size,
)
from cache_service.format.group import Group
from cache_service.format.layout import RowArray, row_arrays
from cache_service.remote.answers import checked_rows
from cache_service.remote.disk import DiskCache
from cache_service.remote.spans import Span
from cache_service.storage.http import COMMITS, HttpStorage
from cache_service.storage.http_exchange import Answer, Question
from cache_service.views.order import epoch_order

MAX_SERVER_WAIT_S = 20
"""How long a server is asked to hold one question; then it is asked again."""


class RowClient:
    """Asks one server for rows of one cache."""

    def __init__(self, storage: HttpStorage, group: Group, disk: DiskCache | None) -> None:
        self._storage = storage
        self._group = group
        self._arrays = row_arrays(group.spec)
        self._disk = disk

    def arrays(self, names: tuple[str, ...]) -> tuple[RowArray, ...]:
        """The arrays to ask for: those named, and `sample`, which proves whose rows they are."""
        return tuple(array for array in self._arrays if array.name in (*names, "sample"))

    def range(self, span: Span, *, wait_s: float = 0.0) -> Arrays:
        """Rows of a span, from the disk where they are there. Raises as `RemoteCache.read`."""
        if self._disk is None or not self._disk.usable:
            return self._ask_range(span, wait_s)[0]
        key = DiskCache.key_of([self._group.fingerprint, *span])
        with self._disk.one_at_a_time(key):
            rows = self._stored(key, span)
            if rows is None:
                rows, content = self._ask_range(span, wait_s)
                self._disk.put(key, content)
        return rows

    def lookup(
        self, seed: int, samples_B: NDArray[np.int32], names: tuple[str, ...], *, wait_s: float
    ) -> Arrays:
        """Rows of samples under a seed, in the order asked for; as many as one request takes."""
        arrays = self.arrays(names)
        question = Question(
            "POST",
            "/lookup?" + self._query(arrays, wait_s, seed=seed),
            {"Accept": MEDIA_TYPE, "Content-Type": "application/octet-stream"},
            samples_B.astype("<i4").tobytes(),
        )
        metadata = lookup_metadata(self._group.fingerprint, seed, len(samples_B))
        return self._ask(question, arrays, metadata, samples_B, wait_s)[0]

    def _stored(self, key: str, span: Span) -> Arrays | None:
        assert self._disk is not None
        found = self._disk.get(key)
        if found is None:
            return None
        content, checksum = found
        try:
            return self._check_range(content, checksum, span)
        except CorruptError:  # the disk's fault; what the server sends will replace it
            return None

    def _ask_range(self, span: Span, wait_s: float) -> tuple[Arrays, bytes]:
        arrays = self.arrays(span.names)
        query = self._query(arrays, wait_s, seed=span.seed, start=span.start, stop=span.stop)
        question = Question("GET", "/rows?" + query, {"Accept": MEDIA_TYPE})
        return self._ask(question, arrays, self._told(span), self._samples(span), wait_s)

    def _check_range(self, content: bytes, checksum: str, span: Span) -> Arrays:
        return checked_rows(
            content,
            checksum,
            arrays=self.arrays(span.names),
            metadata=self._told(span),
            samples_B=self._samples(span),
            what="a piece in the disk cache",
        )

    def _ask(
        self,
        question: Question,
        arrays: tuple[RowArray, ...],
        metadata: dict[str, str],
        samples_B: NDArray[np.int32],
        wait_s: float,
    ) -> tuple[Arrays, bytes]:
        num_rows = len(samples_B)
        size = len(frame_header(arrays, num_rows, metadata)) + values_size(arrays, num_rows)
        patience_s = min(wait_s, MAX_SERVER_WAIT_S)
        what = f"{question.method} {self._storage.url}{question.target}"

        def read(answer: Answer) -> tuple[Arrays, bytes]:
            checksum = answer.headers.get(CHECKSUM_HEADER)
            try:
                rows = checked_rows(
                    answer.body,
                    checksum,
                    arrays=arrays,
                    metadata=metadata,
                    samples_B=samples_B,
                    what=what,
                )
            except CorruptError:
                if checksum == checksum_of(answer.body):  # not damaged: the server means it
                    self._refuse_another_cache()
                raise
            return rows, answer.body

        bounded = question._replace(limit=size, patience_s=patience_s)
        try:
            return self._storage.client.ask(bounded, read, wait_s=wait_s)
        except CorruptError:
            self._refuse_another_cache()
            raise

    def _refuse_another_cache(self) -> None:
        """Rows that do not fit may be those of another cache by now; the manifest tells."""
        self._storage.list(COMMITS)

    def _query(self, arrays: tuple[RowArray, ...], wait_s: float, **numbers: int) -> str:
        query: dict[str, Any] = dict(numbers)
        if len(arrays) < len(self._arrays):
            query["arrays"] = ",".join(array.name for array in arrays)
        if wait_s > 0:
            query["wait"] = f"{min(wait_s, MAX_SERVER_WAIT_S):g}"
        return urlencode(query, safe=",")

    def _told(self, span: Span) -> dict[str, str]:
        return range_metadata(self._group.fingerprint, span.seed, span.start, span.stop)

    def _samples(self, span: Span) -> NDArray[np.int32]:
        order = epoch_order(self._group.spec.dataset.num_samples, span.seed)
        return order[span.start : span.stop]
