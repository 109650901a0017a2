"""Reads a cache and refuses what is not intact: without a commit no rows, and no changed byte.

A `Cache` is one opened Zarr group. Rows come out encoded, as they are stored; `CacheSpec.decode`
makes logits of them. A cache can be pickled into loader workers, because maps and clients are
opened where they are used, and can be shared between threads. No torch, no zarr.

Shape letters: B rows, W witnesses, H side of a view.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from cache_service.errors import (
    CorruptError,
    NotACacheError,
    RowsNotBuiltError,
    SpecMismatchError,
    UnsupportedError,
)
from cache_service.format.codecs import Arrays, Head
from cache_service.format.commit import Commit, commit_key, decode_commit
from cache_service.format.group import ROOT_KEY, Group, decode_group
from cache_service.format.layout import COMMITS_KEY, CacheLayout, described_seeds
from cache_service.format.seeds import describe_seeds
from cache_service.format.shard import decode_chunk
from cache_service.format.spec import CacheSpec
from cache_service.rows.sampler import PositionSampler
from cache_service.rows.shard_reader import Piece, Rows, ShardReader
from cache_service.storage import Storage, open_storage

T = TypeVar("T")
P = ParamSpec("P")

MIN_OPEN_SHARDS = 4
"""Shards kept mapped: a sequential scan needs one, a batch across an edge two."""

MAX_OPEN_SHARDS = 32
"""Small shards kept mapped, all those of a small dataset's seed, so that rows in random order open
none. Each has about five open files, and the usual limit of a process is 1024."""

OPEN_BYTES = 16 << 20
"""16 MiB: rows of the shards kept mapped beyond MIN_OPEN_SHARDS."""

KEPT_ORDERS = 4
"""Seeds whose order is kept: one is 5 MB for 1.28 million samples."""


class _RowType(NamedTuple):
    """The rows of an array as bytes, one element a row, and as numbers."""

    stored: np.dtype[np.void]
    numbers: np.dtype[Any]
    shape: tuple[int, ...]


class Cache:
    """One cache, opened for reading.

    Attributes:
        url: where it lies.
        storage: that it lies in.
        group: everything that its root document says.
        layout: its arrays and objects.
        spec: its identity.
        versions: of the libraries that rendered its views.
        wait_s: how long rows that are not recorded yet are awaited; see `cache_service.remote`.
    """

    wait_s: float = 0.0

    def __init__(self, storage: Storage, group: Group, *, open_shards: int | None = None) -> None:
        self.url = storage.url
        self.storage = storage
        self.group = group
        self.layout: CacheLayout = group.layout
        self.spec: CacheSpec = group.spec
        self.versions = group.versions
        self.arrays = group.layout.arrays
        self._types = {
            each.name: _RowType(
                np.dtype(f"V{each.row_bytes}"),
                np.dtype(each.dtype).newbyteorder("<"),
                each.row_shape,
            )
            for each in self.arrays
        }
        self._open_shards = open_shards or _default_open_shards(group.layout)
        self._start_empty()

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self._owner = object()
        self._shards: LRUCache[tuple[int, int], ShardReader] = LRUCache(self._open_shards)
        self._orders: LRUCache[int, NDArray[np.int32]] = LRUCache(KEPT_ORDERS)

    def __getstate__(self) -> dict[str, Any]:
        """Without maps and lock: a worker opens its own."""
        opened = ("_lock", "_owner", "_shards", "_orders")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As it was pickled, with nothing open."""
        self.__dict__.update(state)
        self._start_empty()

    # --- what is recorded ------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Identity in 64 hexadecimal digits."""
        return self.group.fingerprint

    def commits(self) -> dict[int, list[int]]:
        """Recorded shards by seed, both ascending, as the storage has them now."""
        return list_commits(self.storage, self.spec)

    def num_seeds(self) -> int:
        """Length of the arrays' seed axis: one more than the largest seed that was planned."""
        return described_seeds(self.storage.get(self.layout.seed_axis_keys()[0]))

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
            raise self._not_built(seed, shard)
        names = (*self.layout.names, "witness")
        return decode_commit(
            content, fingerprint=self.fingerprint, seed=seed, shard=shard, names=names
        )

    def witnesses(self, seed: int, shard: int) -> NDArray[np.uint8]:
        """The whole views kept of a shard, uint8 [W, H, H, 3]: those at `witness_positions`."""
        return self._shard(seed, shard).witnesses()

    def head(self) -> Head | None:
        """The linear head of a cache that stores features, else None.

        Raises CorruptError where it is damaged.
        """
        parts = {}
        for name, key in self.layout.head_keys().items():
            shape = self.layout.heads[name]
            payload = decode_chunk(
                self.storage.get(key) or b"",
                checksum=self.group.head_crc32c[name],
                compression="none",
                num_bytes=4 * math.prod(shape),
                what=f"{self.url}/{key}",
            )
            parts[name] = np.frombuffer(payload, "<f4").reshape(shape).astype(np.float32)
        return Head(parts["head_weight"], parts["head_bias"]) if parts else None

    def sampler(
        self, rank: int = 0, world: int = 1, *, batch_size: int | None = None
    ) -> PositionSampler:
        """The positions that one of several processes reads of each seed; see `PositionSampler`."""
        return PositionSampler(
            self.spec.dataset.num_samples,
            rank,
            world,
            batch_size=batch_size,
            pairs=bool(self.spec.recipe.mixing),
        )

    # --- ranges of positions ---------------------------------------------------------------------

    def read(
        self, seed: int, start: int, stop: int, *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of the recorded positions [start, stop), by array name (all by default).

        Raises:
            RowsNotBuiltError: a position is beyond the epoch, or in a shard without a commit.
            CorruptError: stored bytes are not those committed.
        """
        self._check_range(seed, start, stop)  # before memory is taken for it
        rows, done = self._blank_rows(stop - start, arrays), 0
        for number, low, high in self._parts(start, stop):
            self._on_shard(seed, number, ShardReader.read_into, low, high, rows, done)
            done += high - low
        return self._typed(rows)

    def pieces(self, seed: int, start: int, stop: int, name: str) -> list[Piece]:
        """As `read`, one array in pieces, in order.

        Whole chunks of a mapped file are not copied and come with their committed CRC-32C.
        """
        self._check_range(seed, start, stop)
        return [
            piece
            for number, low, high in self._parts(start, stop)
            for piece in self._on_shard(seed, number, ShardReader.pieces, name, low, high)
        ]

    def is_ready(
        self, seed: int, start: int, stop: int, names: tuple[str, ...] | None = None
    ) -> bool:
        """Whether positions [start, stop) can be read without blocking on storage.

        They can when every chunk that holds them is memory-mapped and was checked before. Never
        raises: False for rows outside of the cache, too. `names` are arrays, all by default.
        """
        if not 0 <= start < stop <= self.spec.dataset.num_samples:
            return False
        names, size = names or self.layout.names, self.spec.layout.chunk_rows
        for number, low, high in self._parts(start, stop):
            shard = self._open_shard(seed, number)
            chunks = slice(low // size, (high - 1) // size + 1)
            if shard is None or not shard.is_ready(names, chunks):
                return False
        return True

    def prefetch(self, seed: int, start: int, names: Iterable[str], num_bytes: int) -> None:
        """Check `num_bytes` of each array from a position on, in one shard. Raises as `read`."""
        if start < self.spec.dataset.num_samples:
            shard, row = divmod(start, self.spec.layout.shard_rows)
            if row:
                self._on_shard(seed, shard, ShardReader.prefetch, names, row, num_bytes)

    # --- scattered positions and samples ---------------------------------------------------------

    def gather(
        self, seed: int, positions_B: NDArray[np.int64], *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of scattered positions, in the order asked for. Raises as `read` does."""
        self._check_inside(positions_B, "position")
        shards_B, local_B = np.divmod(positions_B, self.spec.layout.shard_rows)
        rows = self._blank_rows(len(positions_B), arrays)
        by_shard_B = np.argsort(shards_B, kind="stable")
        local_B, shards_B = local_B[by_shard_B], shards_B[by_shard_B]
        numbers, starts = np.unique(shards_B, return_index=True)
        stops = [*starts[1:].tolist(), len(shards_B)]
        # Without positions there is a stop, but no shard.
        for number, start, stop in zip(numbers.tolist(), starts.tolist(), stops, strict=False):
            own = slice(start, stop)
            self._on_shard(
                seed, number, ShardReader.gather_into, local_B[own], rows, by_shard_B[own]
            )
        return self._typed(rows)

    def lookup(
        self, seed: int, samples_B: NDArray[np.int64], *, arrays: tuple[str, ...] | None = None
    ) -> Arrays:
        """Encoded rows of the given samples under a seed, in request order.

        Raises:
            RowsNotBuiltError: a sample outside the dataset, or not recorded yet.
            CorruptError: stored bytes are not those committed.
        """
        self.check_samples(samples_B)
        positions_B = self._order(seed)[samples_B].astype(np.int64)
        if (positions_B < 0).any():
            missing = int(samples_B[positions_B < 0][0])
            raise RowsNotBuiltError(
                f"sample {missing} of seed {seed} is not recorded yet in {self.url}.",
                hint="Run the same `kd-cache build` again to finish it.",
            )
        return self.gather(seed, positions_B, arrays=arrays)

    def is_lookup_ready(
        self, seed: int, samples_B: NDArray[np.int64], names: tuple[str, ...] | None = None
    ) -> bool:
        """As `is_ready`, of a lookup: the seed's order must be in memory, too."""
        with self._lock:
            order = self._orders.get(seed)
        if order is None or _is_outside(samples_B, len(order)).any():
            return False
        names = names or self.layout.names
        shards_B, rows_B = np.divmod(order[samples_B], self.spec.layout.shard_rows)
        chunks_B = rows_B // self.spec.layout.chunk_rows
        for number in np.unique(shards_B).tolist():
            shard = self._open_shard(seed, number)
            if shard is None or not shard.is_ready(names, chunks_B[shards_B == number]):
                return False
        return True

    def check_samples(self, samples_B: NDArray[np.int64]) -> None:
        """Check samples that are to be looked up.

        Raises:
            RowsNotBuiltError: a sample is not one of the dataset.
            UnsupportedError: as `check_visited_once`.
        """
        self.check_visited_once()
        self._check_inside(samples_B, "sample")

    def check_visited_once(self) -> None:
        """Raise UnsupportedError where a sample does not name one row of a seed."""
        repeats = self.spec.recipe.repeats
        if repeats > 1:
            raise UnsupportedError(
                f"rows were requested by sample, but {self.url} was recorded with augment.repeats="
                f"{repeats}: a seed has several rows of one sample, and none of most others.",
                hint="Request rows by position; the array `sample` names the sample of each row.",
            )

    # --- inside ----------------------------------------------------------------------------------

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first row, one after the last row) of positions [start, stop)."""
        size = self.spec.layout.shard_rows
        for shard in range(start // size, (stop - 1) // size + 1):
            first = shard * size
            yield shard, max(start - first, 0), min(stop - first, size)

    def _check_inside(self, numbers_B: NDArray[np.int64], kind: str) -> None:
        count = self.spec.dataset.num_samples
        outside_B = _is_outside(numbers_B, count)
        if outside_B.any():
            raise RowsNotBuiltError(
                f"{kind} {int(numbers_B[outside_B][0])} was requested; {self.url} holds {kind}s "
                f"[0, {count})."
            )

    def _check_range(self, seed: int, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self.spec.dataset.num_samples:
            raise RowsNotBuiltError(
                f"positions [{start}, {stop}) of seed {seed} were requested; "
                f"{self.url} holds positions [0, {self.spec.dataset.num_samples})."
            )

    def _blank_rows(self, num_rows: int, names: tuple[str, ...] | None) -> dict[str, Rows]:
        """Memory for rows of the arrays named (all by default), in the order of the names."""
        chosen = self.layout.names if names is None else names
        return {name: np.empty(num_rows, self._types[name].stored) for name in chosen}

    def _typed(self, rows: dict[str, Rows]) -> Arrays:
        """The same bytes as numbers, each array [B, ...]."""
        typed: Arrays = {}
        for name, values in rows.items():
            _, dtype, shape = self._types[name]
            typed[name] = values.view(dtype).reshape(len(values), *shape)
        return typed

    def _open_shard(self, seed: int, number: int) -> ShardReader | None:
        """The shard if it is open."""
        with self._lock:
            return self._shards.get((seed, number))

    def _on_shard(
        self,
        seed: int,
        number: int,
        use: Callable[Concatenate[ShardReader, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """What `use` returns for the shard; once more if copies of its objects were damaged."""
        try:
            return use(self._shard(seed, number), *args, **kwargs)
        except CorruptError:
            keys = [commit_key(seed, number), *self.layout.object_keys(seed, number).values()]
            if not self.storage.forget(keys):
                raise
        with self._lock:
            self._shards.pop((seed, number), None)
        return use(self._shard(seed, number), *args, **kwargs)

    def _shard(self, seed: int, number: int) -> ShardReader:
        """The shard, opened if it is not."""
        shard = self._open_shard(seed, number)
        if shard is None:
            # Opened without the lock: two threads may both do it, and the later one's is kept.
            commit = self.commit(seed, number)
            shard = ShardReader(self.storage, self.layout, commit, owner=self._owner)
            with self._lock:
                self._shards[seed, number] = shard
        return shard

    def _order(self, seed: int) -> NDArray[np.int32]:
        """Position of every sample under a seed; -1 where its shard is not recorded yet."""
        with self._lock:
            order = self._orders.get(seed)
        if order is not None:
            return order
        shards = self.commits().get(seed, [])
        if not shards:
            raise self._not_built(seed, 0)
        order = np.full(self.spec.dataset.num_samples, -1, np.int32)
        for shard in shards:
            start, stop = self.spec.shard_range(shard)
            samples = self.read(seed, start, stop, arrays=("sample",))["sample"]
            if samples.min() < 0 or samples.max() >= len(order) or (order[samples] >= 0).any():
                raise CorruptError(
                    f"shard {shard} of seed {seed} in {self.url} names samples that are not in "
                    "the dataset, or twice."
                )
            order[samples] = np.arange(start, stop, dtype=np.int32)
        if len(shards) == self.spec.num_shards:  # a growing seed is read afresh each time
            with self._lock:
                self._orders[seed] = order
        return order

    def _not_built(self, seed: int, shard: int) -> RowsNotBuiltError:
        start, stop = self.spec.shard_range(shard)
        return RowsNotBuiltError(
            f"positions [{start}, {stop}) of seed {seed} are not recorded in {self.url}; complete "
            f"seeds there: {describe_seeds(self.complete_seeds())}.",
            hint=f"Record them with `kd-cache build FILE --seeds {seed}:{seed + 1}`.",
        )


def list_commits(storage: Storage, spec: CacheSpec) -> dict[int, list[int]]:
    """Recorded shards by seed, both ascending: one listing of the storage, however many they are.

    Empty where there is no cache.
    """
    commits: dict[int, list[int]] = {}
    for key in storage.list("commits/"):
        seed, _, shard = key.removeprefix("commits/").removesuffix(".json").partition("/")
        # Other keys do not count: 0/00.json, or a shard past the last one.
        if not (seed.isdecimal() and shard.isdecimal()):
            continue
        if commit_key(int(seed), int(shard)) == key and int(shard) < spec.num_shards:
            commits.setdefault(int(seed), []).append(int(shard))
    return {seed: sorted(commits[seed]) for seed in sorted(commits)}


def open_cache(
    url: str, *, fingerprint: str | None = None, open_shards: int | None = None
) -> Cache:
    """Open the cache at a path or URL, its metadata checked document by document.

    Args:
        url: a path, `s3://bucket/prefix`, ...
        fingerprint: refuse any other cache.
        open_shards: how many shards may be mapped at a time; by default MIN_OPEN_SHARDS, more
            where they are small.

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
    open_shards: int | None = None,
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
            f"{url} has fingerprint {group.fingerprint}, but {fingerprint} was requested: it was "
            "recorded from another teacher, recipe, dataset or codec."
        )
    _check_documents(storage, group.layout)
    return Cache(storage, group, open_shards=open_shards)


def _default_open_shards(layout: CacheLayout) -> int:
    """Number of shards that are kept mapped by default."""
    shard_bytes = layout.spec.layout.shard_rows * layout.row_bytes
    return max(MIN_OPEN_SHARDS, min(OPEN_BYTES // shard_bytes, MAX_OPEN_SHARDS))


def _check_documents(storage: Storage, layout: CacheLayout) -> None:
    """Raise CorruptError where the document of an array is missing or not this cache's."""
    documents: dict[int, dict[str, bytes]] = {}
    for key in layout.documents(1).keys() - {COMMITS_KEY}:
        content = storage.get(key)
        length = described_seeds(content)
        if length not in documents:
            documents[length] = layout.documents(length)
        if content != documents[length][key]:
            raise CorruptError(
                f"{storage.url}/{key} is missing or does not describe this cache.",
                hint="Run the same `kd-cache build` again: it writes the metadata anew.",
            )


def _is_outside(numbers_B: NDArray[np.signedinteger[Any]], count: int) -> NDArray[np.bool_]:
    """Whether each number is not in [0, count)."""
    outside_B: NDArray[np.bool_] = numbers_B.astype(np.uint64) >= count  # -1 wraps to far above
    return outside_B
