"""A cache on a server, with the interface of `cache_service.reader.Cache`. No torch.

Ranges of positions are what training reads: the next one is on its way while one is used. Nothing
is taken on trust: each answer is held against the question, the order of the seed, and the
fingerprint that the cache had when it was opened.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import NotACacheError, RowsNotBuiltError, SpecMismatchError
from cache_service.format.codecs import Arrays, Head
from cache_service.format.commit import Commit
from cache_service.format.group import ROOT_KEY, Group, decode_group
from cache_service.format.layout import row_arrays
from cache_service.format.spec import CacheSpec
from cache_service.reader import Cache
from cache_service.remote.ahead import ReadAhead
from cache_service.remote.disk import DiskCache
from cache_service.remote.rows import RowClient
from cache_service.remote.spans import Span, Stride, exact_spans, piece_spans, rows_per_request
from cache_service.storage.http import COMMITS, HttpStorage
from cache_service.storage.http_client import PATIENCE, Patience
from cache_service.views.order import epoch_order

KEPT_PIECES = 2
"""Pieces of the disk kept in memory: a batch across an edge needs two."""


class RemoteCache:
    """One cache on a server, opened for reading. One instance is for one thread.

    Attributes:
        url: where it is.
        spec: its identity.
        versions: of the libraries that rendered its views.
        group: all that its root document says.
        wait_s: how long rows are awaited that are planned but not recorded.
    """

    def __init__(
        self,
        storage: HttpStorage,
        group: Group,
        *,
        wait_s: float = 0.0,
        disk: DiskCache | None = None,
    ) -> None:
        self.url = storage.url
        self.group = group
        self.spec: CacheSpec = group.spec
        self.versions = group.versions
        self.wait_s = wait_s
        self._names = tuple(array.name for array in row_arrays(group.spec))
        self._objects = Cache(storage, group)
        self._rows = RowClient(storage, group, disk)
        self._in_pieces = disk is not None
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Without rows and threads: a worker asks for its own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_ahead", "_stride")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def fingerprint(self) -> str:
        """Identity in 64 hexadecimal digits."""
        return self.group.fingerprint

    def commits(self) -> dict[int, list[int]]:
        """Recorded shards by seed, both ascending, as the server has them now."""
        return self._objects.commits()

    def num_seeds(self) -> int:
        """One more than the largest seed that was planned."""
        return self._objects.num_seeds()

    def complete_seeds(self) -> list[int]:
        """Seeds of which every shard is recorded, ascending."""
        return self._objects.complete_seeds()

    def commit(self, seed: int, shard: int) -> Commit:
        """The checked commit of a shard. Raises as `Cache.commit` does."""
        self._await(seed, shard)
        return self._objects.commit(seed, shard)

    def witnesses(self, seed: int, shard: int) -> NDArray[np.uint8]:
        """The whole views kept of a shard, uint8 [W, H, W, 3]."""
        self._await(seed, shard)
        return self._objects.witnesses(seed, shard)

    def head(self) -> Head | None:
        """The linear head of a `features` cache, else None."""
        return self._objects.head()

    def read(
        self, seed: int, start: int, stop: int, *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of the recorded positions [start, stop), by array name.

        Raises:
            RowsNotBuiltError: a position is beyond the epoch, or not recorded (in time).
            CorruptError: the answers are not the rows asked for, or the cache is damaged.
            StorageError: the server does not answer.
        """
        self._refuse_outside(np.array([start, stop - 1]), f"seed {seed}")
        if start >= stop:
            raise RowsNotBuiltError(f"positions [{start}, {stop}) of seed {seed} are none at all.")
        names = self._names if arrays is None else arrays
        wanted = Span(seed, start, stop, names)
        pieces = []
        for span in self._spans(wanted):
            rows = self._ahead.get(span, self._fetch)
            low, high = max(start - span.start, 0), stop - span.start
            pieces.append({name: rows[name][low:high] for name in names})
        self._look_ahead(wanted, span)
        if len(pieces) == 1 and not self._in_pieces:
            return pieces[0]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in names}

    def gather(
        self, seed: int, positions: NDArray[np.int64], *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of scattered positions, in the order asked for. Raises as `read` does."""
        self._refuse_outside(positions, f"seed {seed}")
        samples = epoch_order(self.spec.dataset.num_samples, seed)[positions]
        return self._look_up(seed, samples, arrays)

    def lookup(
        self, seed: int, samples: NDArray[np.int64], *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of the given samples, in request order. Raises as `read` does."""
        self._refuse_outside(samples, "the dataset")
        return self._look_up(seed, samples.astype(np.int32), arrays)

    def _look_up(
        self, seed: int, samples: NDArray[np.int32], arrays: tuple[str, ...] | None
    ) -> Arrays:
        names = self._names if arrays is None else arrays
        asked = self._rows.arrays(names)
        step = rows_per_request(asked)
        found = [
            self._rows.lookup(seed, samples[low : low + step], names, wait_s=self.wait_s)
            for low in range(0, len(samples), step)
        ]
        none = {array.name: np.empty((0, *array.row_shape), array.dtype) for array in asked}
        return {name: np.concatenate([part[name] for part in found or [none]]) for name in names}

    def _spans(self, wanted: Span) -> list[Span]:
        step = rows_per_request(self._rows.arrays(wanted.names))
        if self._in_pieces:
            return piece_spans(wanted, step, self.spec)
        return exact_spans(wanted, step)

    def _look_ahead(self, wanted: Span, last: Span) -> None:
        """Begin to fetch what is likely to be asked for next."""
        count = self.spec.dataset.num_samples
        if self._in_pieces:
            expected: Span | None = last._replace(start=last.stop, stop=last.stop + 1)
        else:
            expected = self._stride.after(wanted)
        if expected is not None and expected.start < count:
            within = expected._replace(stop=min(expected.stop, count))
            self._ahead.start(self._spans(within)[0], self._rows.range)

    def _fetch(self, span: Span) -> Arrays:
        return self._rows.range(span, wait_s=self.wait_s)

    def _await(self, seed: int, shard: int) -> None:
        """Where rows may be awaited, have the server do it: it also records them sooner."""
        if self.wait_s > 0:
            start, _ = self.spec.shard_range(shard)
            self._fetch(Span(seed, start, start + 1, ("sample",)))

    def _refuse_outside(self, numbers: NDArray[Any], what: str) -> None:
        count = self.spec.dataset.num_samples
        outside = (numbers < 0) | (numbers >= count)
        if outside.any():
            raise RowsNotBuiltError(
                f"number {int(numbers[outside][0])} of {what} was asked for; {self.url} holds "
                f"numbers [0, {count})."
            )

    def _forget(self) -> None:
        self._ahead: ReadAhead[Span, Arrays] = ReadAhead(KEPT_PIECES if self._in_pieces else 0)
        self._stride = Stride()


def open_remote(
    url: str,
    *,
    fingerprint: str | None = None,
    wait_s: float = 0.0,
    disk: DiskCache | None = None,
    patience: Patience = PATIENCE,
) -> RemoteCache:
    """Open the cache at `http(s)://host/v1/caches/NAME`.

    Args:
        url: where.
        fingerprint: refuse any other cache.
        wait_s: how long rows are awaited that are planned but not recorded, and the cache itself
            where its build is queued, in seconds.
        disk: where to keep what the server sent.
        patience: how failures are borne.

    Raises:
        NotACacheError: there is none, or one of a newer format.
        RowsNotBuiltError: its build is queued, and did not begin in time.
        SpecMismatchError: it has another fingerprint.
        ConfigError: the URL is not usable, or the server wants a token.
        StorageError, CorruptError: no answer, or none that makes sense.
    """
    storage = HttpStorage(url, patience)
    content = storage.get(ROOT_KEY, wait_s=wait_s)
    if content is None:
        raise NotACacheError(
            f"no cache at {storage.url}: it has no {ROOT_KEY}.",
            hint="Write http(s)://HOST[:PORT]/v1/caches/NAME; HOST/v1/caches lists the names.",
        )
    group = decode_group(content, storage.url)
    if fingerprint is not None and group.fingerprint != fingerprint:
        raise SpecMismatchError(
            f"{storage.url} has fingerprint {group.fingerprint}, but {fingerprint} was asked for: "
            "it was recorded from another teacher, recipe, dataset or codec."
        )
    storage.fingerprint = group.fingerprint
    storage.list(COMMITS)
    return RemoteCache(storage, group, wait_s=wait_s, disk=disk)
