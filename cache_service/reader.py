"""Reading rows that refuse: no commit, no rows; another byte, no rows. No torch, no zarr.

A `Cache` is one opened Zarr group. Rows come out encoded, as they are stored; decoding is
`cache_service.format.codecs`. Safe to pickle into loader workers: maps and clients are opened where
they are used. Safe to share between threads, too.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import CorruptError, NotACacheError, RowsNotBuiltError, SpecMismatchError
from cache_service.format.codecs import Arrays, Head
from cache_service.format.commit import Commit, commit_key, decode_commit
from cache_service.format.group import ROOT_KEY, Group, decode_group
from cache_service.format.layout import row_arrays
from cache_service.format.seeds import describe_seeds
from cache_service.format.spec import CacheSpec
from cache_service.reader_documents import check_array_documents, list_commits, read_head
from cache_service.reader_memory import (
    NotAtHandError,
    Piece,
    Rows,
    blank_rows,
    first_outside,
    typed_rows,
)
from cache_service.reader_open import OpenShards
from cache_service.reader_shard import ShardRows
from cache_service.storage import Storage, open_storage

SEED_AXIS_KEY = "sample/zarr.json"
"""Every row array has the seed axis; this one is in every cache."""

DEFAULT_OPEN_SHARDS = 4
"""Shards kept mapped: a sequential scan needs one, a batch across an edge two."""

KEPT_ORDERS = 4
"""Seeds whose order is kept: one is 5 MB for 1.28 million samples."""


class Cache:
    """One cache, opened for reading.

    Attributes:
        url: where it is.
        spec: its identity.
        versions: of the libraries that rendered its views.
        wait_s: how long rows that are not recorded yet are awaited; see `cache_service.remote`.
    """

    wait_s: float = 0.0

    def __init__(
        self, storage: Storage, group: Group, *, open_shards: int = DEFAULT_OPEN_SHARDS
    ) -> None:
        self.url = storage.url
        self.storage = storage
        self.group = group
        self.spec: CacheSpec = group.spec
        self.versions = group.versions
        self.arrays = row_arrays(group.spec)
        self._names = (*(array.name for array in self.arrays), "witness")
        self._most_open = open_shards
        self._open_nothing()

    def _open_nothing(self) -> None:
        self._positions: OrderedDict[int, NDArray[np.int32]] = OrderedDict()
        self._lock = threading.Lock()
        self._shards = OpenShards(self.spec, most=self._most_open)

    def __getstate__(self) -> dict[str, Any]:
        """Without maps and lock: a worker opens its own."""
        opened = ("_positions", "_lock", "_shards")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As it was pickled, nothing open."""
        self.__dict__.update(state)
        self._open_nothing()

    @property
    def fingerprint(self) -> str:
        """Identity in 64 hexadecimal digits."""
        return self.group.fingerprint

    def commits(self) -> dict[int, list[int]]:
        """Recorded shards by seed, both ascending, as the storage has them now."""
        return list_commits(self.storage, self.spec.num_shards)

    def num_seeds(self) -> int:
        """Length of the arrays' seed axis: one more than the largest seed that was planned."""
        document = json.loads(self.storage.get(SEED_AXIS_KEY) or b"{}")
        return int(document["shape"][0])

    def complete_seeds(self) -> list[int]:
        """Seeds of which every shard is recorded, ascending."""
        return [s for s, shards in self.commits().items() if len(shards) == self.spec.num_shards]

    def commit(self, seed: int, shard: int) -> Commit:
        """The checked commit of a shard.

        Raises:
            RowsNotBuiltError: there is none.
            CorruptError: it is damaged, or another shard's.
        """
        content = self.storage.get(commit_key(seed, shard))
        if content is None:
            raise self._unbuilt(seed, shard)
        return decode_commit(
            content, fingerprint=self.fingerprint, seed=seed, shard=shard, names=self._names
        )

    def read(
        self, seed: int, start: int, stop: int, *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of the recorded positions [start, stop), by array name.

        Args:
            seed: a recorded seed.
            start: first position.
            stop: one after the last; at most the number of samples.
            arrays: which; all by default.

        Raises:
            RowsNotBuiltError: a position is beyond the epoch, or in a shard without a commit.
            CorruptError: stored bytes are not those committed.
        """
        self._check_range(seed, start, stop)  # before memory is taken for it
        blank = blank_rows(self.arrays, stop - start, arrays)
        self.read_into(seed, start, stop, blank)
        return typed_rows(self.arrays, blank)

    def read_into(
        self, seed: int, start: int, stop: int, out: dict[str, Rows], *, at_hand: bool = False
    ) -> None:
        """As `read`, into memory of the caller's: one element a row, by array name.

        Raises:
            NotAtHandError: `at_hand` was asked for, and storage would have to be touched.
        """
        self._check_range(seed, start, stop)
        size = self.spec.layout.shard_rows
        for shard in range(start // size, (stop - 1) // size + 1):
            first = shard * size
            low, high = max(start, first), min(stop, first + size)
            rows = self._shard(seed, shard, at_hand=at_hand)
            rows.read_into(low - first, high - first, out, low - start, at_hand=at_hand)

    def pieces(self, seed: int, start: int, stop: int, name: str) -> list[Piece]:
        """As `read`, one array in pieces, in order.

        Whole chunks of a mapped file are not copied and come with their committed CRC-32C.
        """
        self._check_range(seed, start, stop)
        size, pieces = self.spec.layout.shard_rows, []
        for shard in range(start // size, (stop - 1) // size + 1):
            first = shard * size
            low, high = max(start, first), min(stop, first + size)
            pieces += self._shard(seed, shard).pieces(name, low - first, high - first)
        return pieces

    def is_ready(
        self, seed: int, start: int, stop: int, names: tuple[str, ...] | None = None
    ) -> bool:
        """Whether positions [start, stop) can be read without blocking on storage.

        They can when every chunk that holds them is memory-mapped and was checked before. Never
        raises: False for rows outside of the cache, too. `names` are arrays, all by default.
        """
        if not 0 <= start < stop <= self.spec.dataset.num_samples:
            return False
        names = self._names[:-1] if names is None else names
        size, chunk = self.spec.layout.shard_rows, self.spec.layout.chunk_rows
        for number in range(start // size, (stop - 1) // size + 1):
            shard, first = self._shards.if_open(seed, number), number * size
            low, high = max(start, first) - first, min(stop, first + size) - first
            chunks = slice(low // chunk, (high - 1) // chunk + 1)
            if shard is None or not shard.is_ready(names, chunks):
                return False
        return True

    def is_lookup_ready(
        self, seed: int, samples: NDArray[np.int64], names: tuple[str, ...] | None = None
    ) -> bool:
        """As `is_ready`, of a lookup: the seed's order must be in memory, too."""
        with self._lock:
            order = self._positions.get(seed)
        if order is None or first_outside(samples, len(order)) is not None:
            return False
        names = self._names[:-1] if names is None else names
        layout = self.spec.layout
        shards, rows = np.divmod(order[samples].astype(np.int64), layout.shard_rows)
        for number in np.unique(shards).tolist():
            shard = self._shards.if_open(seed, number)
            chunks = rows[shards == number] // layout.chunk_rows
            if shard is None or not shard.is_ready(names, chunks):
                return False
        return True

    def check_ahead(self, seed: int, start: int, names: Iterable[str], num_bytes: int) -> None:
        """Check chunks from a position on, to the shard's end at most. Raises as `read`."""
        if start < self.spec.dataset.num_samples:
            shard, row = divmod(start, self.spec.layout.shard_rows)
            if row:
                self._shard(seed, shard).check_ahead(names, row, num_bytes)

    def gather(
        self, seed: int, positions: NDArray[np.int64], *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of scattered positions, in the order asked for. Raises as `read` does."""
        return typed_rows(self.arrays, self.gather_rows(seed, positions, arrays))

    def gather_rows(
        self,
        seed: int,
        positions: NDArray[np.int64],
        names: tuple[str, ...] | None,
        *,
        at_hand: bool = False,
    ) -> dict[str, Rows]:
        """As `gather`, the rows as bytes: one element a row. `at_hand` is as in `read_into`."""
        count = self.spec.dataset.num_samples
        first = first_outside(positions, count)
        if first is not None:
            raise RowsNotBuiltError(
                f"position {first} of seed {seed} was asked for; {self.url} records positions "
                f"[0, {count})."
            )
        names = self._names[:-1] if names is None else names
        return self._shards.gather(seed, positions, names, None if at_hand else self._open_shard)

    def lookup_rows(
        self, seed: int, samples: NDArray[np.int64], names: tuple[str, ...], *, at_hand: bool
    ) -> dict[str, Rows]:
        """As `lookup`, the rows as bytes: one element a row. `at_hand` is as in `read_into`."""
        positions = self.locate(seed, samples, at_hand=at_hand)  # all of them in the epoch
        return self._shards.gather(seed, positions, names, None if at_hand else self._open_shard)

    def lookup(
        self, seed: int, samples: NDArray[np.int64], *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of the given samples under a seed, in request order.

        Raises:
            RowsNotBuiltError: a sample outside the dataset, or not recorded yet.
            CorruptError: stored bytes are not those committed.
        """
        return self.gather(seed, self.locate(seed, samples), arrays=arrays)

    def locate(
        self, seed: int, samples: NDArray[np.int64], *, at_hand: bool = False
    ) -> NDArray[np.int64]:
        """Where samples are recorded under a seed. Raises as `lookup` and `gather_rows` do."""
        self.check_samples(samples)
        positions = self._positions_of(seed, at_hand=at_hand)[samples].astype(np.int64)
        if (positions < 0).any():
            missing = int(samples[positions < 0][0])
            raise RowsNotBuiltError(
                f"sample {missing} of seed {seed} is not recorded yet in {self.url}.",
                hint="Run the same `kd-cache build` again to finish it.",
            )
        return positions

    def check_samples(self, samples: NDArray[np.int64]) -> None:
        """Raise RowsNotBuiltError where a sample is not one of the dataset."""
        count = self.spec.dataset.num_samples
        first = first_outside(samples, count)
        if first is not None:
            raise RowsNotBuiltError(
                f"sample {first} was asked for; {self.url} holds samples [0, {count})."
            )

    def witnesses(self, seed: int, shard: int) -> NDArray[np.uint8]:
        """The whole views kept of a shard, uint8 [W, H, W, 3]; see `layout.witness_positions`."""
        return self._shard(seed, shard).witnesses()

    def head(self) -> Head | None:
        """The linear head of a `features` cache, else None."""
        return read_head(self.storage, self.group)

    def _check_range(self, seed: int, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self.spec.dataset.num_samples:
            raise RowsNotBuiltError(
                f"positions [{start}, {stop}) of seed {seed} were asked for; "
                f"{self.url} records positions [0, {self.spec.dataset.num_samples})."
            )

    def _shard(self, seed: int, shard: int, *, at_hand: bool = False) -> ShardRows:
        return self._shards.shard(seed, shard, None if at_hand else self._open_shard)

    def _open_shard(self, seed: int, shard: int) -> ShardRows:
        return ShardRows(self.storage, self.spec, self.commit(seed, shard))

    def _positions_of(self, seed: int, *, at_hand: bool = False) -> NDArray[np.int32]:
        """Position of every sample under a seed; -1 where its shard is not recorded yet."""
        with self._lock:
            known = self._positions.get(seed)
            if known is not None:
                self._positions.move_to_end(seed)
                return known
        if at_hand:
            raise NotAtHandError
        shards = self.commits().get(seed, [])
        if not shards:
            raise self._unbuilt(seed, 0)
        inverse = np.full(self.spec.dataset.num_samples, -1, np.int32)
        for shard in shards:
            start, stop = self.spec.shard_range(shard)
            order = self.read(seed, start, stop, arrays=("sample",))["sample"]
            if order.min() < 0 or order.max() >= len(inverse) or (inverse[order] >= 0).any():
                raise CorruptError(
                    f"shard {shard} of seed {seed} in {self.url} names samples that are not in "
                    "the dataset, or twice."
                )
            inverse[order] = np.arange(start, stop, dtype=np.int32)
        if len(shards) == self.spec.num_shards:  # a growing seed is looked up afresh each time
            with self._lock:
                self._positions[seed] = inverse
                while len(self._positions) > KEPT_ORDERS:
                    self._positions.popitem(last=False)
        return inverse

    def _unbuilt(self, seed: int, shard: int) -> RowsNotBuiltError:
        start, stop = self.spec.shard_range(shard)
        seeds = self.complete_seeds()
        return RowsNotBuiltError(
            f"positions [{start}, {stop}) of seed {seed} are not recorded in {self.url}; complete "
            f"seeds there: {describe_seeds(seeds)}.",
            hint=f"Record them with `kd-cache build FILE --seeds {seed}:{seed + 1}`.",
        )


def open_cache(
    url: str, *, fingerprint: str | None = None, open_shards: int = DEFAULT_OPEN_SHARDS
) -> Cache:
    """Open the cache at a path or URL, its metadata checked document by document.

    Args:
        url: a path, `s3://bucket/prefix`, ...
        fingerprint: refuse any other cache.
        open_shards: how many shards may be mapped at a time.

    Raises:
        NotACacheError: there is none, or one of a newer format.
        CorruptError: a metadata document is not what was written.
        SpecMismatchError: it has another fingerprint.
    """
    return open_stored(open_storage(url), fingerprint=fingerprint, open_shards=open_shards)


def open_stored(
    storage: Storage,
    *,
    fingerprint: str | None = None,
    open_shards: int = DEFAULT_OPEN_SHARDS,
) -> Cache:
    """As `open_cache`, of a storage that is open."""
    url = storage.url
    content = storage.get(ROOT_KEY)
    if content is None:
        raise NotACacheError(
            f"no cache at {url}: it has no {ROOT_KEY}.",
            hint="Record one with `kd-cache build FILE`.",
        )
    group = decode_group(content, url)
    if fingerprint is not None and group.fingerprint != fingerprint:
        raise SpecMismatchError(
            f"{url} has fingerprint {group.fingerprint}, but {fingerprint} was asked for: it was "
            "recorded from another teacher, recipe, dataset or codec."
        )
    check_array_documents(storage, group)
    return Cache(storage, group, open_shards=open_shards)
