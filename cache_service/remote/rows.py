"""Requests rows of one cache from a server, or takes them from the disk cache, and checks them.

A response is compared with the request before a row of it is used: the frame's shape, metadata and
checksum, the samples in their order, and that all numbers are finite. Safe to use from two threads.

Shape letters: B rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import CorruptError
from cache_service.format.codecs import Arrays, RowArray
from cache_service.format.frame import (
    CHECKSUM_HEADER,
    MEDIA_TYPE,
    checksum_of,
    decode_frame,
    frame_header,
    lookup_metadata,
    range_metadata,
    values_size,
)
from cache_service.format.group import Group
from cache_service.remote.prefetch import Span
from cache_service.storage.disk import DiskCache
from cache_service.storage.http import COMMITS, HttpStorage
from cache_service.storage.http_client import Request, Response
from cache_service.views.order import epoch_order

MAX_SERVER_WAIT_S = 8
"""How long a server is asked to wait for rows in one request; then the request is repeated. With
the pause before that it is 10 s, so that the log can say every 10 s what is awaited."""


def checked_rows(
    body: bytes,
    checksum: str | None,
    *,
    arrays: Sequence[RowArray],
    metadata: Mapping[str, str],
    samples_B: NDArray[np.int32],
    what: str,
) -> Arrays:
    """Decodes a frame and checks that it answers the request.

    Args:
        body: of the response.
        checksum: from the response's header.
        arrays: the requested ones; `sample` is one of them.
        metadata: what the frame must state.
        samples_B: the samples whose rows these must be, in order.
        what: the request, for messages.

    Raises:
        CorruptError: damaged, of another shape, cache or samples, or with non-finite numbers.
    """
    rows = decode_frame(
        body,
        checksum=checksum,
        arrays=arrays,
        num_rows=len(samples_B),
        metadata=metadata,
        what=what,
    )
    if not np.array_equal(rows["sample"], samples_B):
        first = int(np.flatnonzero(rows["sample"] != samples_B)[0])
        raise CorruptError(
            f"{what} returned sample {int(rows['sample'][first])} in row {first} instead of sample "
            f"{int(samples_B[first])}."
        )
    for name, values in rows.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise CorruptError(
                f"{what} returned NaN or infinity in {name}; neither is ever recorded."
            )
    # Copies: values in a frame may be misaligned, and its bytes are read-only.
    return {name: values.astype(values.dtype.newbyteorder("=")) for name, values in rows.items()}


class RowClient:
    """Requests rows of one cache from one server."""

    def __init__(self, storage: HttpStorage, group: Group, disk: DiskCache | None) -> None:
        self._storage = storage
        self._group = group
        self._arrays = group.layout.arrays
        self._disk = disk

    def arrays(self, names: tuple[str, ...]) -> tuple[RowArray, ...]:
        """The arrays to request: those named, and `sample`, which proves whose rows they are."""
        return tuple(array for array in self._arrays if array.name in (*names, "sample"))

    def range(self, span: Span, *, wait_s: float = 0.0) -> Arrays:
        """Rows of a span, from the disk cache if it has them. Raises as `RemoteCache.read` does."""
        if self._disk is None or not self._disk.usable:
            return self._request_range(span, wait_s)[0]
        key = DiskCache.key_of([self._group.fingerprint, *span])
        with self._disk.one_at_a_time(key):
            rows = self._from_disk(key, span)
            if rows is None:
                rows, content = self._request_range(span, wait_s)
                self._disk.put(key, content)
        return rows

    def lookup(
        self, seed: int, samples_B: NDArray[np.int32], names: tuple[str, ...], *, wait_s: float
    ) -> Arrays:
        """Rows of samples under a seed in request order; as many as one request allows."""
        arrays = self.arrays(names)
        request = Request(
            "POST",
            "/lookup?" + self._query(arrays, wait_s, seed=seed),
            {"Accept": MEDIA_TYPE, "Content-Type": "application/octet-stream"},
            samples_B.astype("<i4").tobytes(),
        )
        metadata = lookup_metadata(self._group.fingerprint, seed, len(samples_B))
        return self._request(request, arrays, metadata, samples_B, wait_s)[0]

    def _from_disk(self, key: str, span: Span) -> Arrays | None:
        assert self._disk is not None
        found = self._disk.get(key)
        if found is None:
            return None
        content, checksum = found
        try:
            return self._check_range(content, checksum, span)
        except CorruptError:  # a damaged file; what the server sends replaces it
            return None

    def _request_range(self, span: Span, wait_s: float) -> tuple[Arrays, bytes]:
        arrays = self.arrays(span.names)
        query = self._query(arrays, wait_s, seed=span.seed, start=span.start, stop=span.stop)
        # Proxies may keep a response for ever under an address with the fingerprint.
        query += f"&fingerprint={self._group.fingerprint}"
        request = Request("GET", "/rows?" + query, {"Accept": MEDIA_TYPE})
        return self._request(
            request, arrays, self._range_metadata(span), self._samples(span), wait_s
        )

    def _check_range(self, content: bytes, checksum: str, span: Span) -> Arrays:
        return checked_rows(
            content,
            checksum,
            arrays=self.arrays(span.names),
            metadata=self._range_metadata(span),
            samples_B=self._samples(span),
            what="a piece in the disk cache",
        )

    def _request(
        self,
        request: Request,
        arrays: tuple[RowArray, ...],
        metadata: dict[str, str],
        samples_B: NDArray[np.int32],
        wait_s: float,
    ) -> tuple[Arrays, bytes]:
        num_rows = len(samples_B)
        size = len(frame_header(arrays, num_rows, metadata)) + values_size(arrays, num_rows)
        server_wait_s = min(wait_s, MAX_SERVER_WAIT_S)
        what = f"{request.method} {self._storage.url}{request.target}"

        def parse(response: Response) -> tuple[Arrays, bytes]:
            checksum = response.headers.get(CHECKSUM_HEADER)
            try:
                rows = checked_rows(
                    response.body,
                    checksum,
                    arrays=arrays,
                    metadata=metadata,
                    samples_B=samples_B,
                    what=what,
                )
            except CorruptError:
                if checksum == checksum_of(
                    response.body
                ):  # undamaged, so the server sent other rows
                    self._refuse_another_cache()
                raise
            return rows, response.body

        bounded = request._replace(limit=size, server_wait_s=server_wait_s)
        try:
            return self._storage.client.send(bounded, parse, wait_s=wait_s)
        except CorruptError:
            self._refuse_another_cache()
            raise

    def _refuse_another_cache(self) -> None:
        """Raises if the server now holds another cache under this name: its manifest tells."""
        self._storage.list(COMMITS)

    def _query(self, arrays: tuple[RowArray, ...], wait_s: float, **numbers: int) -> str:
        query: dict[str, Any] = dict(numbers)
        if len(arrays) < len(self._arrays):
            query["arrays"] = ",".join(array.name for array in arrays)
        if wait_s > 0:
            query["wait"] = f"{min(wait_s, MAX_SERVER_WAIT_S):g}"
        return urlencode(query, safe=",")

    def _range_metadata(self, span: Span) -> dict[str, str]:
        return range_metadata(self._group.fingerprint, span.seed, span.start, span.stop)

    def _samples(self, span: Span) -> NDArray[np.int32]:
        spec = self._group.spec
        order = epoch_order(spec.dataset.num_samples, span.seed, spec.recipe.repeats)
        return order[span.start : span.stop]
