"""A cache on a server, with the interface of `cache_service.rows.reader.Cache`. No torch.

Training reads ranges of positions, so the next range is fetched while the current one is used. Each
response is checked against the request, the order of the seed, and the fingerprint that the cache
had when it was opened.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import NotACacheError, RowsNotBuiltError, SpecMismatchError
from cache_service.format.codecs import Arrays
from cache_service.format.commit import Commit
from cache_service.format.group import ROOT_KEY, Group, decode_group
from cache_service.remote.prefetch import (
    Prefetcher,
    Span,
    StridePredictor,
    aligned_spans,
    exact_spans,
    rows_per_request,
)
from cache_service.remote.rows import RowClient
from cache_service.rows.reader import Cache
from cache_service.storage.disk import DiskCache
from cache_service.storage.http import COMMITS, HttpStorage
from cache_service.storage.retries import DEFAULT_RETRIES, RetryPolicy
from cache_service.views.order import BLOCK_ROWS, epoch_order

KEPT_PIECES = 8
"""Aligned pieces kept in memory, 64 MiB at most: a batch that crosses the edge of a piece needs
two, and the batches of a later pass read those of a block in turn."""


class RemoteCache(Cache):
    """One cache on a server, opened for reading. One instance is for one thread.

    Documents, commits and witnesses are read object by object as from any storage; rows come from
    the row routes of the server.

    Attributes:
        wait_s: how long to wait for rows that are planned but not recorded, in seconds.
    """

    def __init__(
        self,
        storage: HttpStorage,
        group: Group,
        *,
        wait_s: float = 0.0,
        disk: DiskCache | None = None,
    ) -> None:
        self._aligned = disk is not None
        super().__init__(storage, group)
        self.wait_s = wait_s
        self._rows = RowClient(storage, group, disk)

    def _start_empty(self) -> None:
        super()._start_empty()
        keeps = self._aligned or self.spec.recipe.repeats > 1
        self._prefetch = Prefetcher(KEPT_PIECES if keeps else 0)
        self._predictor = StridePredictor()

    def __getstate__(self) -> dict[str, Any]:
        """Without rows and threads: each worker fetches its own."""
        state = super().__getstate__()
        return {k: v for k, v in state.items() if k not in ("_prefetch", "_predictor")}

    def commit(self, seed: int, shard: int) -> Commit:
        """The checked commit of a shard, once the server has it. Raises as `Cache.commit` does."""
        if self.wait_s > 0:
            # A request for a row makes the server wait, and record this shard before others.
            start, _ = self.spec.shard_range(shard)
            self._fetch(Span(seed, start, start + 1, ("sample",)))
        return super().commit(seed, shard)

    def read(
        self, seed: int, start: int, stop: int, *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of the recorded positions [start, stop), by array name.

        Raises:
            RowsNotBuiltError: a position is beyond the epoch, or not recorded within `wait_s`.
            CorruptError: a response does not match its request, or the cache is damaged.
            StorageError: the server does not respond.
        """
        self._refuse_outside(np.array([start, stop - 1]), f"seed {seed}")
        if start >= stop:
            raise RowsNotBuiltError(
                f"`start` ({start}) must be smaller than `stop` ({stop}), for seed {seed}."
            )
        names = self.layout.names if arrays is None else arrays
        requested = Span(seed, start, stop, names)
        pieces = []
        for span in self._spans(requested):
            rows = self._prefetch.get(span, self._fetch)
            low, high = max(start - span.start, 0), stop - span.start
            pieces.append({name: rows[name][low:high] for name in names})
        self._start_prefetch(requested, span)
        if len(pieces) == 1 and not self._aligned:
            return pieces[0]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in names}

    def gather(
        self, seed: int, positions: NDArray[np.int64], *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of scattered positions, in request order. Raises as `read` does.

        They are requested by sample. Only if a sample does not name one row, or if aligned pieces
        are kept on disk and few of them contain all positions, whole pieces are requested.
        """
        self._refuse_outside(positions, f"seed {seed}")
        if self._aligned or self.spec.recipe.repeats > 1:
            names = self.layout.names if arrays is None else arrays
            pieces = self._pieces_with(seed, positions, names)
            num_blocks = 2 + len(positions) // BLOCK_ROWS
            step = rows_per_request(self._rows.arrays(names))
            is_near = len(pieces) <= num_blocks * (BLOCK_ROWS // step + 2)
            if is_near or self.spec.recipe.repeats > 1:
                return self._gather_from(pieces, positions, names)
        samples = epoch_order(self.spec.dataset.num_samples, seed)[positions]
        return self._look_up(seed, samples, arrays)

    def _pieces_with(
        self, seed: int, positions: NDArray[np.int64], names: tuple[str, ...]
    ) -> list[Span]:
        """The aligned pieces that contain these positions."""
        step = rows_per_request(self._rows.arrays(names))
        pieces: list[Span] = []
        for position in np.unique(positions).tolist():
            if not pieces or position >= pieces[-1].stop:
                pieces += aligned_spans(Span(seed, position, position + 1, names), step, self.spec)
        return pieces

    def _gather_from(
        self, pieces: list[Span], positions: NDArray[np.int64], names: tuple[str, ...]
    ) -> Arrays:
        arrays = [array for array in self.layout.arrays if array.name in names]
        rows: Arrays = {a.name: np.empty((len(positions), *a.row_shape), a.dtype) for a in arrays}
        for span in pieces:
            piece = self._prefetch.get(span, self._fetch)
            where = np.flatnonzero((positions >= span.start) & (positions < span.stop))
            for name in names:
                rows[name][where] = piece[name][positions[where] - span.start]
        return {name: rows[name] for name in names}

    def lookup(
        self, seed: int, samples: NDArray[np.int64], *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of the given samples, in request order. Raises as `read` does."""
        self.check_visited_once()
        self._refuse_outside(samples, "the dataset")
        return self._look_up(seed, samples.astype(np.int32), arrays)

    def _look_up(
        self, seed: int, samples: NDArray[np.int32], arrays: tuple[str, ...] | None
    ) -> Arrays:
        names = self.layout.names if arrays is None else arrays
        arrays_sent = self._rows.arrays(names)
        step = rows_per_request(arrays_sent)
        parts = [
            self._rows.lookup(seed, samples[low : low + step], names, wait_s=self.wait_s)
            for low in range(0, len(samples), step)
        ]
        empty = {array.name: np.empty((0, *array.row_shape), array.dtype) for array in arrays_sent}
        return {name: np.concatenate([part[name] for part in parts or [empty]]) for name in names}

    def _spans(self, span: Span) -> list[Span]:
        step = rows_per_request(self._rows.arrays(span.names))
        if self._aligned:
            return aligned_spans(span, step, self.spec)
        return exact_spans(span, step)

    def _start_prefetch(self, requested: Span, last: Span) -> None:
        """Begins to fetch the range that is likely to be read next."""
        count = self.spec.dataset.num_samples
        if self._aligned:
            expected: Span | None = last._replace(start=last.stop, stop=last.stop + 1)
        else:
            expected = self._predictor.next_after(requested)
        if expected is not None and expected.start < count:
            within = expected._replace(stop=min(expected.stop, count))
            self._prefetch.start(self._spans(within)[0], self._rows.range)

    def _fetch(self, span: Span) -> Arrays:
        return self._rows.range(span, wait_s=self.wait_s)

    def _refuse_outside(self, numbers: NDArray[Any], what: str) -> None:
        count = self.spec.dataset.num_samples
        outside = (numbers < 0) | (numbers >= count)
        if outside.any():
            raise RowsNotBuiltError(
                f"row {int(numbers[outside][0])} of {what} was requested; {self.url} has rows "
                f"[0, {count})."
            )


def open_remote(
    url: str,
    *,
    fingerprint: str | None = None,
    wait_s: float = 0.0,
    disk: DiskCache | None = None,
    retries: RetryPolicy = DEFAULT_RETRIES,
) -> RemoteCache:
    """Open the cache at `http(s)://host/v1/caches/NAME`.

    Args:
        url: the address.
        fingerprint: any other cache is refused.
        wait_s: how long to wait for rows that are planned but not recorded, and for the cache
            itself if its build is queued, in seconds.
        disk: where to keep the rows that the server sent.
        retries: for how long failed requests are repeated.

    Raises:
        NotACacheError: there is no cache, or one of a newer format.
        RowsNotBuiltError: its build is queued, and did not begin in time.
        SpecMismatchError: it has another fingerprint.
        ConfigError: the URL is not usable, or the server asks for a token.
        StorageError, CorruptError: no response, or an invalid one.
    """
    storage = HttpStorage(url, retries)
    content = storage.get(ROOT_KEY, wait_s=wait_s)
    if content is None:
        raise NotACacheError(
            f"no cache at {storage.url}: it has no {ROOT_KEY}.",
            hint="Write http(s)://HOST[:PORT]/v1/caches/NAME; HOST/v1/caches lists the names.",
        )
    group = decode_group(content, storage.url)
    if fingerprint is not None and group.fingerprint != fingerprint:
        raise SpecMismatchError(
            f"{storage.url} has fingerprint {group.fingerprint}, but {fingerprint} was requested: "
            "it was recorded with another teacher, recipe, dataset or codec."
        )
    storage.fingerprint = group.fingerprint
    storage.list(COMMITS)
    return RemoteCache(storage, group, wait_s=wait_s, disk=disk)
