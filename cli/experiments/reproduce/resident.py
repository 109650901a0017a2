"""A whole small dataset on the student's device: views are cut out of it there.

The same batches as the ordinary stream's, byte for byte: crops and mirror images only copy pixels,
and what is drawn is a function of the recipe and the seed. So a run may go on with either.
Shape letters: N samples, B batch, R cells, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache_service.datasets import ImageDataset
from cache_service.errors import ViewDriftError
from cache_service.format.recipe import HorizontalFlip, PadCrop, Recipe
from cache_service.views.draws import epoch_order, positions_of
from cache_service.views.render import make_renderer
from distill.batches import Batch, Cursor
from distill.config import TrainConfig
from distill.data import Replay, tensors_of
from distill.methods.requirements import SecondView, other_seed
from distill.stream import ReplayedStream, Stream, open_stream
from distill.students import choose_device

CHECKED = 64
"""Views of each seed that are also rendered the ordinary way and held against the recording."""

MAX_BYTES = 2 * 2**30
"""Of padded images; more are streamed."""


class _Epoch(NamedTuple):
    """One seed, whole, on the device. `places_N` are samples' positions, the rest is in order."""

    samples_N: Tensor
    places_N: Tensor
    draws_N3: Tensor
    rows: tuple[dict[str, Tensor], ...]


class ResidentStream:
    """The batches of another stream, made on the device from images that stay there.

    Args:
        streamed: what it stands for; its facts, its caches and its checks are used.
        device: of images, draws and rows.
    """

    def __init__(self, streamed: ReplayedStream, device: torch.device) -> None:
        self.facts = streamed.facts
        self._streamed = streamed
        self._device = device
        replay = streamed.replay
        self._recipe = replay.views.recipe
        self._renderer = make_renderer(self._recipe)
        self._padded_NHW3 = _pad(replay.images, self._recipe).to(device)
        self._labels_N = torch.from_numpy(np.array(replay.images.labels)).to(device)
        self._epochs: dict[int, _Epoch] = {}

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The batches from a step on, on the device.

        Raises:
            SpecMismatchError, ViewDriftError: the first views of a seed are not what was recorded.
        """
        plan = self.facts.plan
        for step in range(first_step, plan.num_steps):
            cursor = plan.cursor(step)
            seeds = [cursor.seed]
            if self._streamed.requirements.other_views:
                seeds.append(other_seed(plan.seeds, cursor.epoch))
            epoch, *others = self._open(seeds)
            positions_B = torch.arange(cursor.start, cursor.stop, device=self._device)
            batch = self._batch(epoch, positions_B, cursor)
            if others:
                positions_B = others[0].places_N[batch.samples_B]
                second = self._batch(others[0], positions_B, cursor._replace(seed=seeds[1]))
                batch = batch._replace(other_views={SecondView.name: second})
            yield batch

    def teacher_logits(self, batch: Batch, *, temperature: float, cache: int) -> Tensor:
        """Recorded logits, decoded on the device."""
        return self._streamed.teacher_logits(batch, temperature=temperature, cache=cache)

    def _batch(self, epoch: _Epoch, positions_B: Tensor, cursor: Cursor) -> Batch:
        samples_B = epoch.samples_N[positions_B]
        labels_B = self._labels_N[samples_B]
        return Batch(
            images_BHW3=self._cut(epoch, positions_B),
            labels_B=labels_B,
            partner_labels_B=labels_B,
            weights_B=torch.ones(len(labels_B), device=self._device),
            samples_B=samples_B,
            rows=tuple({k: row[positions_B] for k, row in rows.items()} for rows in epoch.rows),
            cursor=cursor,
        )

    def _open(self, seeds: Sequence[int]) -> list[_Epoch]:
        """Of these seeds; those of others are let go."""
        self._epochs = {
            seed: self._epochs[seed] if seed in self._epochs else self._load(seed) for seed in seeds
        }
        return [self._epochs[seed] for seed in seeds]

    def _load(self, seed: int) -> _Epoch:
        order_N = epoch_order(self.facts.plan.num_samples, seed)
        names = [decoder.array_names for decoder in self._streamed.decoders]
        rows = [
            tensors_of(cache.read(seed, 0, len(order_N)), wanted)
            for cache, wanted in zip(self._streamed.replay.caches, names, strict=True)
        ]
        epoch = _Epoch(
            samples_N=torch.from_numpy(order_N.astype(np.int64)).to(self._device),
            places_N=torch.from_numpy(positions_of(order_N).astype(np.int64)).to(self._device),
            draws_N3=self._draw(seed, order_N).to(self._device),
            rows=tuple({k: row.to(self._device) for k, row in each.items()} for each in rows),
        )
        first_B = torch.arange(min(CHECKED, len(order_N)), device=self._device)
        _refuse_other_views(self._streamed.replay, seed, self._cut(epoch, first_B))
        return epoch

    def _draw(self, seed: int, order_N: np.ndarray[tuple[int], np.dtype[np.int32]]) -> Tensor:
        """Top and left in the padded image and whether to mirror, int64 [N, 3]."""
        params_NP = self._renderer.draw(seed, order_N)
        draws_N3 = np.zeros((len(order_N), 3), np.int64)
        column = 0
        for op in self._recipe.ops:
            first, width = (0, 2) if isinstance(op, PadCrop) else (2, 1)
            draws_N3[:, first : first + width] = params_NP[:, column : column + width]
            column += width
        return torch.from_numpy(draws_N3)

    def _cut(self, epoch: _Epoch, positions_B: Tensor) -> Tensor:
        """Views, uint8 [B, H, W, 3]."""
        top_B1, left_B1, mirrored_B1 = epoch.draws_N3[positions_B].unsqueeze(-1).unbind(dim=1)
        along_S = torch.arange(self._recipe.size, device=self._device)
        rows_BH = top_B1 + along_S
        columns_BW = left_B1 + torch.where(mirrored_B1 == 1, along_S.flip(0), along_S)
        samples_B11 = epoch.samples_N[positions_B, None, None]
        return self._padded_NHW3[samples_B11, rows_BH[:, :, None], columns_BW[:, None, :]]


def open_resident(configs: Sequence[TrainConfig]) -> Stream:
    """The stream of students: resident where recipe, size and methods allow, else as always.

    Args:
        configs: their train files, which have one stream; at least one.

    Raises:
        KdCacheError: as `open_stream`.
    """
    shared = configs[0]
    device = choose_device(shared.device)
    methods = [config.method for config in configs]
    streamed = open_stream(shared, device=device, seeds=shared.seeds, methods=methods)
    required = streamed.requirements
    can_stay = (
        set(required.other_views) <= {SecondView}
        and required.special_classes is None
        and _can_stay(streamed.replay)
    )
    return ResidentStream(streamed, device) if can_stay else streamed


def _can_stay(replay: Replay) -> bool:
    recipe, images = replay.views.recipe, replay.images
    framing, *others = recipe.ops or (None,)
    if not isinstance(framing, PadCrop) or len(others) > 1:
        return False
    if any(not isinstance(op, HorizontalFlip) for op in others):
        return False
    side = recipe.size + 2 * framing.padding
    return images.image(0).size == (recipe.size,) * 2 and len(images) * side**2 * 3 <= MAX_BYTES


def _pad(images: ImageDataset, recipe: Recipe) -> Tensor:
    """Every image with its border, uint8 [N, H, W, 3]."""
    framing = recipe.ops[0]
    assert isinstance(framing, PadCrop)
    pixels_NHW3 = np.stack([np.asarray(images.image(sample)) for sample in range(len(images))])
    border = ((0, 0), (framing.padding,) * 2, (framing.padding,) * 2, (0, 0))
    return torch.from_numpy(np.pad(pixels_NHW3, border, mode=framing.mode))


def _refuse_other_views(replay: Replay, seed: int, views_BHW3: Tensor) -> None:
    """Refuse a seed whose first views are not those that are rendered and recorded."""
    positions = np.arange(len(views_BHW3), dtype=np.int64)
    rendered, _ = replay(seed, positions)  # holds them against every cache
    if not np.array_equal(rendered.pixels_BHW3, views_BHW3.cpu().numpy()):
        raise ViewDriftError(
            f"the views of seed {seed} cut on {views_BHW3.device} are not those that are rendered."
        )
