"""Replayed views joined to recorded rows: a map-style dataset, and the trainer's loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from cache_service.datasets import ImageDataset, wrap_dataset
from cache_service.errors import SpecMismatchError
from cache_service.format.codecs import Arrays
from cache_service.format.recipe import Recipe
from cache_service.loading import STALLED_S, load_ahead
from cache_service.remote.source import RowSource
from cache_service.views.replay import ViewBatch, Views
from distill.batches import Batch, BatchPlan, Cursor
from distill.methods import Requirements, ViewSelection
from distill.replay import ReplayGuard
from distill.targets import TargetDecoder


class Replay:
    """Joins the views of one recipe to the rows of caches that recorded it. Picklable.

    Raises:
        SpecMismatchError: a cache of another dataset or recipe.
    """

    def __init__(
        self,
        images: ImageDataset,
        caches: Sequence[RowSource],
        *,
        recipe: Recipe | None = None,
        max_drift: int = 0,
    ) -> None:
        for cache in caches:
            _refuse_other(cache, images, recipe or caches[0].spec.recipe)
        chosen = recipe if recipe is not None else caches[0].spec.recipe
        self.images = images
        self.caches = tuple(caches)
        self.views = Views(chosen, images)
        self._guards = [ReplayGuard(cache, max_drift=max_drift) for cache in caches]

    def __call__(self, seed: int, positions: NDArray[np.int64]) -> tuple[ViewBatch, list[Arrays]]:
        """The views at these positions of a seed, and each cache's rows of them, checked."""
        batch = self.views.render(seed, positions)
        rows = []
        for cache, guard in zip(self.caches, self._guards, strict=True):
            found = _rows(cache, seed, positions)
            guard.check(self.views, seed, positions, batch, found)
            rows.append(found)
        return batch, rows


def _rows(cache: RowSource, seed: int, positions: NDArray[np.int64]) -> Arrays:
    """One slice where the positions run on, which is what a loader asks for."""
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 == len(positions) and (np.diff(positions) == 1).all():
        return cache.read(seed, first, last + 1)
    return cache.gather(seed, positions)


def _refuse_other(cache: RowSource, images: ImageDataset, recipe: Recipe) -> None:
    recorded = cache.spec.dataset
    if recorded.sha256 != images.id.sha256:
        raise SpecMismatchError(
            f"{cache.url} was recorded from dataset {recorded.name} {recorded.split} with "
            f"{recorded.num_samples} samples (sha256 {recorded.sha256[:12]}), but this run has "
            f"{images.id.name} {images.id.split} with {images.id.num_samples} samples (sha256 "
            f"{images.id.sha256[:12]}): images, labels, class order or paths differ."
        )
    if cache.spec.recipe != recipe:
        raise SpecMismatchError(
            f"{cache.url} was recorded with another recipe than the rest of this run: it has "
            f"{cache.spec.recipe.model_dump_json()}, wanted {recipe.model_dump_json()}.",
            hint="Teachers can be combined only over one recipe: they must see the same views.",
        )


class CachedDataset(Dataset[tuple[Any, Any, Tensor]]):
    """(image, label, teacher logits) for a training loop of your own.

    Item i is position i of the recorded epoch, which is already shuffled: load it with
    `shuffle=False`. A batch costs one cache read (`__getitems__`).

    An item is a float32 image [3, H, W] on the 0 to 1 scale (or what `transform` makes of the uint8
    tensor [3, H, W]); an int label, or for a mixing recipe float32 class shares [C]; and float32
    logits, [C], or [cells, C] where the cache holds scales beyond 1.

    Args:
        cache: from `load_cache`.
        images: the dataset that was recorded: any map-style dataset of (image, label).
        seed: which recorded epoch.
        transform: applied to each view, a uint8 tensor [3, H, W].
        temperature: matters for `topk` caches alone; see `TargetDecoder.logits`.
        max_drift: see `ReplayGuard`.

    Raises:
        SpecMismatchError: `images` is not the dataset that was recorded.
    """

    def __init__(
        self,
        cache: RowSource,
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
        cache.commit(seed, 0)  # a seed that is not recorded is refused here, not in a worker

    def __len__(self) -> int:
        """Positions of a recorded epoch."""
        return len(self._replay.images)

    def __getitem__(self, position: int) -> tuple[Any, Any, Tensor]:
        """The item at one position; see the class."""
        if not 0 <= position < len(self):
            raise IndexError(position)
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[tuple[Any, Any, Tensor]]:
        """The items at these positions, with one cache read."""
        batch, (rows,) = self._replay(self._seed, np.array(positions, np.int64))
        logits_BRC = self._decoder.logits(tensors_of(rows, self._decoder.array_names))
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
        weights = torch.from_numpy(batch.weights_B)
        partner = self._replay.images.labels[batch.partners_B]
        shares_BC.index_put_((rows, torch.from_numpy(own)), weights, accumulate=True)
        shares_BC.index_put_((rows, torch.from_numpy(partner)), 1 - weights, accumulate=True)
        return list(shares_BC)


def _to_unit_scale(image_3HW: Tensor) -> Tensor:
    return image_3HW.float() / 255


def tensors_of(rows: Arrays, names: Sequence[str]) -> dict[str, Tensor]:
    """The arrays of these names as tensors, for a decoder."""
    # torch indexes with neither uint16 nor uint32; int64 is what scatter wants anyway
    return {
        name: torch.from_numpy(
            rows[name].astype(np.int64) if name == "classes" else np.ascontiguousarray(rows[name])
        )
        for name in names
    }


class _PlannedBatches:
    """Step -> Batch, in whichever process."""

    def __init__(self, replay: Replay, plan: BatchPlan, selection: ViewSelection) -> None:
        self._replay = replay
        self._plan = plan
        self._selection = selection
        specs = [cache.spec for cache in replay.caches]
        self._names = [TargetDecoder(spec, None, device="cpu").array_names for spec in specs]

    def __call__(self, step: int) -> Batch:
        cursor = self._plan.cursor(step)
        at = {"seed": cursor.seed, "epoch": cursor.epoch}
        batch = self._batch(cursor, self._selection.positions(cursor.start, cursor.stop, **at))
        others = self._selection.other_views(batch.samples_B.numpy(), **at)
        return batch._replace(
            other_views={
                name: self._batch(cursor._replace(seed=seed), positions)
                for name, (seed, positions) in others.items()
            }
        )

    def _batch(self, cursor: Cursor, positions: NDArray[np.int64]) -> Batch:
        views, rows = self._replay(cursor.seed, positions)
        labels = self._replay.images.labels
        return Batch(
            images_BHW3=torch.from_numpy(views.pixels_BHW3),
            labels_B=torch.from_numpy(labels[views.samples_B]),
            partner_labels_B=torch.from_numpy(labels[views.partners_B]),
            weights_B=torch.from_numpy(views.weights_B),
            samples_B=torch.from_numpy(views.samples_B.astype(np.int64)),
            rows=tuple(
                tensors_of(found, names) for found, names in zip(rows, self._names, strict=True)
            ),
            cursor=cursor,
        )


def train_loader(
    replay: Replay,
    plan: BatchPlan,
    *,
    requirements: Requirements | None = None,
    first_step: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    context: str = "forkserver",
) -> Iterator[Batch]:
    """The plan's batches from `first_step` on, in order, whatever the number of workers.

    `requirements` of methods add other views to each batch, or select the samples of an epoch.

    Raises:
        KdCacheError: from reading or replaying, also out of a worker.
    """
    selection = ViewSelection(
        requirements or Requirements(), labels_N=replay.images.labels, seeds=plan.seeds
    )
    return load_ahead(
        _PlannedBatches(replay, plan, selection),
        range(first_step, plan.num_steps),
        workers=workers,
        pin_memory=pin_memory,
        context=context,
        # Rows that are awaited are no stall.
        stalled_s=STALLED_S + max((cache.wait_s for cache in replay.caches), default=0.0),
    )
