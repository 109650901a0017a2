"""`load_cache` and `CachedDataset`, for use in a custom training loop."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.utils.data import Dataset

from cache_service.datasets import wrap_dataset
from cache_service.errors import ConfigError, RowsNotBuiltError
from cache_service.format.seeds import describe_seeds, parse_seeds
from cache_service.human_format import human_bytes
from cache_service.remote.source import DEFAULT_DISK_BYTES, DiskSettings, open_source
from cache_service.rows.reader import Cache
from cache_service.storage import is_bucket_url
from cache_service.storage.staged import StagedStorage
from cache_service.views.order import pass_order
from cache_service.views.replay import ViewBatch
from distill.reading_order import Epoch, EpochSampler, OrderCheck, is_in_order
from distill.replay import Replay
from distill.targets import TargetDecoder, tensors_of

Order = Literal["recorded", "any"]
"""Which positions a loader may ask for: the next ones only, or any."""


class CachedDataset(Dataset[tuple[Any, Any, Tensor]]):
    """Map-style dataset of (image, label, teacher logits) for a custom training loop.

    With `seed`, item i is position i of that recorded epoch. With `seeds`, epoch e is the recorded
    epoch of seed `seeds[e % len(seeds)]`, and `set_epoch` begins it. Item i is position i during
    the first pass over the seeds. During later ones the positions come in other batches, as in
    `kd-cache train` (`pass_order`). The order of an epoch is a shuffle already, so use
    `shuffle=False` or `sampler()`. A DataLoader reads each batch with one access to the cache
    (`__getitems__`).

    The image is float32 [3, H, W] in 0 to 1, or the result of `transform`. The label is an int, or
    float32 class weights [C] if the recipe mixes images. The logits are float32 [C], or [cells, C]
    if the cache has scales above 1.

    Args:
        cache: a cache from `load_cache`.
        images: the dataset that was recorded, a map-style dataset of (image, label).
        seed: the only recorded epoch to read.
        seeds: the recorded epochs to read in turn, as numbers or as `"0:30"`. Give either `seed`
            or `seeds`.
        transform: function of each view, a uint8 tensor [3, H, W].
        temperature: affects only caches with codec `topk`; see `TargetDecoder.logits`.
        max_drift: largest accepted difference of a pixel; see `ReplayGuard`.
        order: `recorded` refuses batches that do not follow the recorded order, and an epoch that
            is read twice because `set_epoch` is not called. `any` accepts them, and warns once if
            the cache is in a bucket. The default is `recorded` with `seeds`, and `any` with `seed`.
            Single items, `data[i]`, may be read in any order.

    Raises:
        SpecMismatchError: `images` is not the dataset that was recorded.
        RowsNotBuiltError: a seed is not recorded.
        ConfigError: both or none of `seed` and `seeds` are given.
    """

    def __init__(
        self,
        cache: Cache,
        images: Any,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | str | None = None,
        transform: Callable[[Tensor], Any] | None = None,
        temperature: float = 1.0,
        max_drift: int = 0,
        order: Order | None = None,
    ) -> None:
        if order is not None and order not in get_args(Order):
            raise ConfigError(f"order={order!r} was requested; it is 'recorded' or 'any'.")
        self._replay = Replay(wrap_dataset(images), [cache], max_drift=max_drift)
        self._decoder = TargetDecoder(cache.spec, cache.head(), device="cpu")
        self._seeds = _chosen_seeds(cache, seed, seeds)
        self._takes_turns = seeds is not None
        self._transform = transform or _to_unit_scale
        self._temperature = temperature
        self._epoch = Epoch()
        self._check: OrderCheck | None = None
        if order == "recorded" or (order is None and seeds is not None):
            self._check = OrderCheck(
                self._epoch,
                num_samples=len(self),
                num_seeds=len(self._seeds),
                mixes=bool(cache.spec.recipe.mixing),
            )
        self._warns = _is_slow_when_scattered(cache)

    def __len__(self) -> int:
        """Number of positions of a recorded epoch."""
        return len(self._replay.images)

    @property
    def seed(self) -> int:
        """The seed of the current epoch."""
        return self._seeds[self._epoch.turn.epoch % len(self._seeds)]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that are read in turn."""
        return self._seeds

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, before a loader iterates over it; also in workers that are running.

        Accelerate, the Hugging Face Trainer and timm's train.py call it.

        Raises:
            ConfigError: the epoch is negative or not a whole number.
        """
        self._epoch.set(epoch)

    def state_dict(self) -> dict[str, int]:
        """The epoch, for loaders that resume, such as torchdata's StatefulDataLoader."""
        return {"epoch": self._epoch.turn.epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Begin the epoch of a `state_dict`, unless it is the current one."""
        if state["epoch"] != self._epoch.turn.epoch:
            self.set_epoch(state["epoch"])

    def sampler(
        self, rank: int | None = None, world: int | None = None, *, batch_size: int | None = None
    ) -> EpochSampler:
        """The positions that one of several processes reads of each epoch, in recorded order.

        Its `set_epoch` is that of this dataset. Give it to a `DataLoader(sampler=...)`, unless a
        trainer divides the batches itself, as Accelerate and the Hugging Face Trainer do.

        Args:
            rank: index of this process; by default that of `torch.distributed`, else 0.
            world: number of processes; by default that of `torch.distributed`, else 1.
            batch_size: views per process and step, as given to the DataLoader; see
                `cache_service.rows.sampler.PositionSampler`.

        Raises:
            ConfigError: see `PositionSampler`.
        """
        joined = distributed.is_available() and distributed.is_initialized()
        if rank is None:
            rank = distributed.get_rank() if joined else 0
        if world is None:
            world = distributed.get_world_size() if joined else 1
        if self._check is not None:
            self._check.divide(world, batch_size)
        return EpochSampler(
            self._epoch,
            len(self._seeds),
            len(self),
            rank,
            world,
            batch_size=batch_size,
            pairs=bool(self._replay.views.recipe.mixing),
        )

    def __getitem__(self, position: int) -> tuple[Any, Any, Tensor]:
        """Return the item at one position."""
        if not 0 <= position < len(self):
            raise IndexError(position)
        return self._items([position])[0]

    def __getitems__(self, positions: list[int]) -> list[tuple[Any, Any, Tensor]]:
        """Return the items at several positions, with one read of the cache.

        Raises:
            ConfigError: the order of the epoch is checked, and these positions do not follow it.
        """
        if not positions:
            return []
        if self._check is not None:
            self._check.check(positions)
        elif self._warns and not is_in_order(positions):
            self._warns = False
            warnings.warn(_scattered(self._replay.caches[0]), stacklevel=2)
        return self._items(positions)

    def _items(self, positions: list[int]) -> list[tuple[Any, Any, Tensor]]:
        batch, (rows,) = self._replay(self.seed, self._recorded(positions))
        logits_BRC = self._decoder.logits(
            tensors_of(rows, self._decoder.array_names), temperature=self._temperature
        )
        # A cache without scales above 1 has a single cell, the whole image.
        if self._decoder.num_cells == 1:
            logits_BRC = logits_BRC[:, 0]
        images_B3HW = torch.from_numpy(batch.pixels_BHW3).permute(0, 3, 1, 2)
        labels = self._labels(batch)
        return [
            (self._transform(image), label, logits)
            for image, label, logits in zip(images_B3HW, labels, logits_BRC, strict=True)
        ]

    def _recorded(self, places: list[int]) -> NDArray[np.int64]:
        """The recorded positions at these places of the current epoch."""
        places_B = np.array(places, np.int64)
        turn = self._epoch.turn.epoch // len(self._seeds)
        if turn == 0 or not self._takes_turns:
            return places_B
        repeats = self._replay.views.recipe.repeats
        return pass_order(len(self), self.seed, repeats, turn)[places_B]

    def _labels(self, batch: ViewBatch) -> list[Any]:
        own = self._replay.images.labels[batch.samples_B]
        if not self._replay.views.recipe.mixing:
            return [int(label) for label in own]
        shares_BC = torch.zeros(len(own), self._decoder.num_classes)
        rows = torch.arange(len(own))
        # accumulate: both labels of a pair may be the same class, whose weights then add up to 1.
        weights = torch.from_numpy(batch.weights_B)
        partner = self._replay.images.labels[batch.partners_B]
        shares_BC.index_put_((rows, torch.from_numpy(own)), weights, accumulate=True)
        shares_BC.index_put_((rows, torch.from_numpy(partner)), 1 - weights, accumulate=True)
        return list(shares_BC)


def _chosen_seeds(
    cache: Cache, seed: int | None, seeds: Iterable[int] | str | None
) -> tuple[int, ...]:
    if (seed is None) == (seeds is None):
        raise ConfigError(
            f"CachedDataset was given seed={seed} and seeds={seeds}.",
            hint="Give seed=0 for one recorded epoch, or seeds=range(30) for epochs in turn.",
        )
    if seed is not None:
        cache.commit(seed, 0)  # fail here for a seed that is not recorded, not in a worker
        return (seed,)
    try:
        numbers = parse_seeds(seeds) if isinstance(seeds, str) else seeds or ()
        wanted = tuple(operator.index(number) for number in numbers)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"CachedDataset was given seeds={seeds!r}: {error}.") from error
    if not wanted:
        raise ConfigError(
            "CachedDataset was given no seeds.", hint="Give seeds=cache.complete_seeds()."
        )
    return recorded_seeds([cache], wanted)


def _is_slow_when_scattered(cache: Cache) -> bool:
    """Whether batches in random order would fetch parts of a bucket's objects again and again."""
    if not is_bucket_url(cache.url):
        return False
    kept = cache.storage.disk.max_bytes if isinstance(cache.storage, StagedStorage) else 0
    return kept < _epoch_bytes(cache)


def _epoch_bytes(cache: Cache) -> int:
    return sum(map(cache.layout.row_object_bytes, range(cache.spec.num_shards)))


def _scattered(cache: Cache) -> str:
    return (
        f"{cache.url} is read in random order. Each batch then reads parts of many objects, which "
        "takes hundreds of times as many requests as reading in order. The recorded order is a "
        "shuffle already: use DataLoader(shuffle=False), or let disk_cache_bytes hold the "
        f"{human_bytes(_epoch_bytes(cache))} of an epoch."
    )


def _to_unit_scale(image_3HW: Tensor) -> Tensor:
    return image_3HW.float() / 255


def load_cache(
    url: str,
    *,
    fingerprint: str | None = None,
    wait_s: float = 0.0,
    disk_cache: str | None = None,
    disk_cache_bytes: int = DEFAULT_DISK_BYTES,
    open_shards: int | None = None,
) -> Cache:
    """Open a cache by path or URL.

    Args:
        url: a path, `s3://bucket/prefix`, or `http(s)://host/v1/caches/NAME`. A server's token
            comes from the environment, KD_CACHE_TOKEN.
        fingerprint: refuse a cache with another fingerprint.
        wait_s: longest time to wait for rows that are planned but not recorded yet, in seconds.
        disk_cache: folder in which rows from a server, or objects of a bucket, are kept. None is
            `~/.cache/kd-cache` for a bucket, and no folder for a server.
        disk_cache_bytes: largest size of `disk_cache`, in bytes; 0 keeps nothing.
        open_shards: number of shards of a local cache that may be mapped at the same time; by
            default 4, more where they are small. Random access needs all shards.

    Raises:
        NotACacheError, CorruptError, SpecMismatchError, StorageError, ConfigError: see the message.
    """
    return open_source(
        url,
        fingerprint=fingerprint,
        wait_s=wait_s,
        disk=DiskSettings(disk_cache, disk_cache_bytes),
        open_shards=open_shards,
    )


def recorded_seeds(caches: Sequence[Cache], wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the requested seeds, or all seeds that are complete in every cache.

    For a cache with `wait_s`, all planned seeds count as complete.

    Raises:
        RowsNotBuiltError: a cache lacks a requested seed, or no seed is complete in all caches.
    """
    usable = [_usable(cache) for cache in caches]
    common = sorted(set.intersection(*usable))
    if wanted is None:
        if not common:
            raise RowsNotBuiltError(
                f"no seed is complete in {' and '.join(cache.url for cache in caches)}.",
                hint="Run `kd-cache build FILE` again: it resumes. While a build runs, wait_s in "
                "the train file awaits its rows.",
            )
        return tuple(common)
    for cache, seeds in zip(caches, usable, strict=True):
        missing = [seed for seed in wanted if seed not in seeds]
        if missing:
            state = "planned" if cache.wait_s > 0 else "complete"
            raise RowsNotBuiltError(
                f"seeds {describe_seeds(missing)} were asked for, but {cache.url} has "
                f"{describe_seeds(sorted(seeds))} {state}.",
                hint=f"Record them with `kd-cache build FILE --seeds {describe_seeds(missing)}`.",
            )
    return wanted


def _usable(cache: Cache) -> set[int]:
    return set(range(cache.num_seeds()) if cache.wait_s > 0 else cache.complete_seeds())
