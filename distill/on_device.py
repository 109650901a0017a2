"""Stores a small dataset on the student's device and crops the views there.

The batches are byte-identical to those of the worker processes: padding, crops and flips only copy
pixels, and every draw is a function of the recipe and the seed. A run may therefore be resumed with
either loader. Shape letters: N samples, B batch, H W pixels, S side of a view.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from cachetools import LRUCache
from numpy.typing import NDArray
from torch import Tensor

from cache_service.errors import ConfigError, ViewDriftError
from cache_service.format.codecs import Arrays
from cache_service.format.recipe import PadCrop
from cache_service.human_format import human_bytes
from cache_service.views.identity import digest64
from cache_service.views.order import draw_seeds, epoch_order
from cache_service.views.render import make_renderer
from distill.batches import Batch, Cursor
from distill.replay import Replay
from distill.targets import tensors_of

MAX_BYTES = 2 * 2**30
"""Largest total size of the padded images and the rows of all loaded seeds."""

NUM_RENDERED = 64
"""Views per seed that are compared with the CPU renderer if no cache records their digests."""

CHECK_VIEWS = 2048
"""Views that are copied to the host at a time to compare their digests."""


class _Epoch(NamedTuple):
    """All samples, draws and rows of one seed on the device, in order of position."""

    samples_N: Tensor
    draws_N3: Tensor
    """Top and left edge in the padded image, px, and 1 if the view is flipped horizontally."""
    rows: tuple[dict[str, Tensor], ...]


class DeviceViews:
    """Makes batches on a device from images and rows in its memory.

    Args:
        replay: dataset, recipe and caches. It also checks views that differ from their digests.
        padded_NHW3: all images with their borders, uint8.
        device: device of the batches.
        num_seeds: number of seeds in memory; 2 if a method compares views of two seeds.
    """

    def __init__(
        self, replay: Replay, padded_NHW3: Tensor, device: torch.device, *, num_seeds: int
    ) -> None:
        self._replay = replay
        self._device = device
        self._padded_NHW3 = padded_NHW3.to(device)
        self._labels_N = torch.from_numpy(np.array(replay.images.labels)).to(device)
        self._recipe = replay.views.recipe
        self._renderer = make_renderer(self._recipe)
        self._epochs: LRUCache[int, _Epoch] = LRUCache(num_seeds)
        self._checked_seeds: set[int] = set()

    def batch(self, cursor: Cursor, positions_B: NDArray[np.int64]) -> Batch:
        """Make a batch of the views and rows at these positions of the cursor's seed.

        Raises:
            SpecMismatchError, ViewDriftError: a view of the seed differs from the recorded one.
        """
        epoch = self._open(cursor.seed)
        chosen_B = torch.from_numpy(positions_B).to(self._device, non_blocking=True)
        samples_B = epoch.samples_N[chosen_B]
        labels_B = self._labels_N[samples_B]
        return Batch(
            images_BHW3=self._cut(epoch, chosen_B),
            labels_B=labels_B,
            partner_labels_B=labels_B,
            weights_B=torch.ones(len(labels_B), device=self._device),
            samples_B=samples_B,
            rows=tuple({k: row[chosen_B] for k, row in rows.items()} for rows in epoch.rows),
            cursor=cursor,
        )

    def _open(self, seed: int) -> _Epoch:
        if seed not in self._epochs:
            if len(self._epochs) == self._epochs.maxsize:
                self._epochs.popitem()  # free its memory before the next seed is loaded
            self._epochs[seed] = self._load(seed)
        return self._epochs[seed]

    def _load(self, seed: int) -> _Epoch:
        order_N = epoch_order(len(self._replay.images), seed, self._recipe.repeats)
        read = [cache.read(seed, 0, len(order_N)) for cache in self._replay.caches]
        epoch = _Epoch(
            samples_N=torch.from_numpy(order_N.astype(np.int64)).to(self._device),
            draws_N3=self._draw(seed, order_N).to(self._device),
            rows=tuple(
                {k: row.to(self._device) for k, row in tensors_of(rows, names).items()}
                for rows, names in zip(read, self._replay.array_names, strict=True)
            ),
        )
        if seed not in self._checked_seeds:
            self._check(seed, order_N, epoch, read)
            self._checked_seeds.add(seed)
        return epoch

    def _draw(self, seed: int, order_N: NDArray[np.int32]) -> Tensor:
        # P is 2 without flips; the third column then stays 0.
        all_N = np.arange(len(order_N))
        seeds = draw_seeds(len(order_N), seed, self._recipe.repeats, all_N)
        params_NP = self._renderer.draw(seeds, order_N)
        draws_N3 = np.zeros((len(order_N), 3), np.int64)
        draws_N3[:, : params_NP.shape[1]] = params_NP
        return torch.from_numpy(draws_N3)

    def _cut(self, epoch: _Epoch, positions_B: Tensor) -> Tensor:
        """Crop views from the padded images, uint8 [B, S, S, 3]."""
        top_B1, left_B1, mirrored_B1 = epoch.draws_N3[positions_B].unsqueeze(-1).unbind(dim=1)
        along_S = torch.arange(self._recipe.size, device=self._device)
        rows_BS = top_B1 + along_S
        columns_BS = left_B1 + torch.where(mirrored_B1 == 1, along_S.flip(0), along_S)
        samples_B11 = epoch.samples_N[positions_B, None, None]
        # Indices of shapes [B, 1, 1], [B, S, 1] and [B, 1, S] broadcast to [B, S, S].
        return self._padded_NHW3[samples_B11, rows_BS[:, :, None], columns_BS[:, None, :]]

    def _check(
        self, seed: int, order_N: NDArray[np.int32], epoch: _Epoch, read: list[Arrays]
    ) -> None:
        """Compare every view of a seed with its digest in every cache.

        Views that differ are rendered again on the CPU by `Replay`. It raises an error with the
        cause, or accepts them if the train file allows drift. Without caches, the first views of
        the seed are compared with the CPU renderer.
        """
        num_views = len(order_N) if read else min(NUM_RENDERED, len(order_N))
        for start in range(0, num_views, CHECK_VIEWS):
            part = slice(start, min(start + CHECK_VIEWS, num_views))
            positions_B = torch.arange(part.start, part.stop, device=self._device)
            views_BSS3 = self._cut(epoch, positions_B).cpu().numpy()
            # Without recorded digests, all views of this part are rendered on the CPU.
            differs_B = np.full(len(views_BSS3), not read)
            if read:
                digests_B = np.array([digest64(view) for view in views_BSS3], np.uint64)
            for rows in read:
                differs_B |= rows["sample"][part] != order_N[part]
                differs_B |= rows["digest"][part] != digests_B
            if not differs_B.any():
                continue
            rendered, _ = self._replay(seed, start + np.flatnonzero(differs_B))
            if not np.array_equal(rendered.pixels_BHW3, views_BSS3[differs_B]):
                raise ViewDriftError(
                    f"the views of seed {seed} that are cut on {self._device} differ from those "
                    "that are rendered on the CPU.",
                    hint="Use `loader: workers`.",
                )


def open_on_device(
    replay: Replay, device: torch.device, *, loader: str, num_seeds: int
) -> DeviceViews | None:
    """Load a dataset onto the device; return None if worker processes should render the views.

    Args:
        replay: dataset, recipe and caches.
        device: device of the students.
        loader: setting of the train file. `device` requires the device. `auto` uses it if that is
            possible and streaming is not better; see `_is_better_streamed`.
        num_seeds: number of seeds from which a batch takes views.

    Raises:
        ConfigError: `loader: device` is not possible. The message names the reason.
    """
    if loader == "workers":
        return None
    obstacle = _obstacle(replay, num_seeds)
    if obstacle is not None and loader == "device":
        raise ConfigError(
            f"loader: device is not possible here: {obstacle}.",
            hint="Use `loader: auto`, which makes such views in worker processes.",
        )
    if obstacle is not None or (loader == "auto" and _is_better_streamed(replay)):
        return None
    return DeviceViews(replay, _pad_images(replay), device, num_seeds=num_seeds)


def _is_better_streamed(replay: Replay) -> bool:
    """Return whether it is better to read rows and images in small parts.

    This is so for rows that come over a network or are still being recorded, and for images that
    are much larger than their views, because a single process would decode all of them before the
    first step.
    """
    if any("://" in cache.url or cache.wait_s > 0 for cache in replay.caches):
        return True
    return max(replay.images.image(0).size) > 2 * replay.views.recipe.size


def _obstacle(replay: Replay, num_seeds: int) -> str | None:
    """Return why the views cannot be made on the device, or None if they can."""
    recipe, num_samples = replay.views.recipe, len(replay.images)
    ops = [op.op for op in recipe.ops]
    if recipe.callable is not None or ops not in (["pad_crop"], ["pad_crop", "horizontal_flip"]):
        made_by = recipe.callable or ", ".join(ops)
        return f"the views are made by {made_by}, and only pad_crop and horizontal_flip copy pixels"
    side = recipe.size + 2 * _padding(replay).padding
    # One additional seed: the rows of the next seed are read before those of the last are freed.
    rows = (num_seeds + 1) * sum(cache.group.layout.row_bytes for cache in replay.caches)
    num_bytes = num_samples * (side**2 * 3 + rows)
    if num_bytes > MAX_BYTES:
        return (
            f"images and rows would take {human_bytes(num_bytes)} on the device, and at most "
            f"{human_bytes(MAX_BYTES)} are used"
        )
    return None


def _padding(replay: Replay) -> PadCrop:
    framing = replay.views.recipe.ops[0]
    assert isinstance(framing, PadCrop)
    return framing


def _pad_images(replay: Replay) -> Tensor:
    """Resize every image to the size of the view and add its border: uint8 [N, H, W, 3]."""
    framing, recipe = _padding(replay), replay.views.recipe
    side = recipe.size + 2 * framing.padding
    padded_NHW3 = np.empty((len(replay.images), side, side, 3), np.uint8)
    border = ((framing.padding,) * 2, (framing.padding,) * 2, (0, 0))
    renderer = make_renderer(recipe)
    middle = [framing.padding, framing.padding, 0][: 1 + len(recipe.ops)]
    for sample, out_HW3 in enumerate(padded_NHW3):
        # The center crop without a flip is the resized image before padding.
        image_HW3 = renderer.pixels(replay.images.image(sample), middle)
        out_HW3[:] = np.pad(image_HW3, border, mode=framing.mode)
    return torch.from_numpy(padded_NHW3)
