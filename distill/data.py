"""`load_cache` and `CachedDataset`, for use in a custom training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cache_service.datasets import wrap_dataset
from cache_service.errors import RowsNotBuiltError
from cache_service.format.seeds import describe_seeds
from cache_service.remote.source import DEFAULT_DISK_BYTES, DiskSettings, open_source
from cache_service.rows.reader import DEFAULT_OPEN_SHARDS, Cache
from cache_service.views.replay import ViewBatch
from distill.replay import Replay
from distill.targets import TargetDecoder, tensors_of


class CachedDataset(Dataset[tuple[Any, Any, Tensor]]):
    """Map-style dataset of (image, label, teacher logits) for a custom training loop.

    Item i is position i of the recorded epoch. The epoch is already shuffled, so use
    `shuffle=False`. A DataLoader reads each batch with one access to the cache (`__getitems__`).

    The image is float32 [3, H, W] in 0 to 1, or the result of `transform`. The label is an int, or
    float32 class weights [C] if the recipe mixes images. The logits are float32 [C], or [cells, C]
    if the cache has scales above 1.

    Args:
        cache: a cache from `load_cache`.
        images: the dataset that was recorded, a map-style dataset of (image, label).
        seed: the recorded epoch to read.
        transform: function of each view, a uint8 tensor [3, H, W].
        temperature: affects only caches with codec `topk`; see `TargetDecoder.logits`.
        max_drift: largest accepted difference of a pixel; see `ReplayGuard`.

    Raises:
        SpecMismatchError: `images` is not the dataset that was recorded.
    """

    def __init__(
        self,
        cache: Cache,
        images: Any,
        *,
        seed: int,
        transform: Callable[[Tensor], Any] | None = None,
        temperature: float = 1.0,
        max_drift: int = 0,
    ) -> None:
        self._replay = Replay(wrap_dataset(images), [cache], max_drift=max_drift)
        self._decoder = TargetDecoder(cache.spec, cache.head(), device="cpu")
        self._seed = seed
        self._transform = transform or _to_unit_scale
        self._temperature = temperature
        cache.commit(seed, 0)  # fail here for a seed that is not recorded, not in a worker

    def __len__(self) -> int:
        """Number of positions of a recorded epoch."""
        return len(self._replay.images)

    def __getitem__(self, position: int) -> tuple[Any, Any, Tensor]:
        """Return the item at one position."""
        if not 0 <= position < len(self):
            raise IndexError(position)
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[tuple[Any, Any, Tensor]]:
        """Return the items at several positions, with one read of the cache."""
        batch, (rows,) = self._replay(self._seed, np.array(positions, np.int64))
        logits_BRC = self._decoder.logits(tensors_of(rows, self._decoder.array_names))
        # A cache without scales above 1 has a single cell, the whole image.
        if self._decoder.num_cells == 1:
            logits_BRC = logits_BRC[:, 0]
        images_B3HW = torch.from_numpy(batch.pixels_BHW3).permute(0, 3, 1, 2)
        labels = self._labels(batch)
        return [
            (self._transform(image), label, logits)
            for image, label, logits in zip(images_B3HW, labels, logits_BRC, strict=True)
        ]

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


def _to_unit_scale(image_3HW: Tensor) -> Tensor:
    return image_3HW.float() / 255


def load_cache(
    url: str,
    *,
    fingerprint: str | None = None,
    wait_s: float = 0.0,
    disk_cache: str | None = None,
    disk_cache_bytes: int = DEFAULT_DISK_BYTES,
    open_shards: int = DEFAULT_OPEN_SHARDS,
) -> Cache:
    """Open a cache by path or URL.

    Args:
        url: a path, `s3://bucket/prefix`, or `http(s)://host/v1/caches/NAME`. A server's token
            comes from the environment, KD_CACHE_TOKEN.
        fingerprint: refuse a cache with another fingerprint.
        wait_s: longest time to wait for rows that are planned but not recorded yet, in seconds.
        disk_cache: folder in which rows from a server are cached.
        disk_cache_bytes: largest size of `disk_cache`, in bytes.
        open_shards: number of shards of a local cache that may be mapped at the same time. A
            sequential scan needs few; random access needs all shards.

    Raises:
        NotACacheError, CorruptError, SpecMismatchError, StorageError, ConfigError: see the message.
    """
    disk = None if disk_cache is None else DiskSettings(disk_cache, disk_cache_bytes)
    return open_source(
        url, fingerprint=fingerprint, wait_s=wait_s, disk=disk, open_shards=open_shards
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
