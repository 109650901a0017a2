"""Stores a small dataset on the student's device and makes the views there.

The batches are byte-identical to those of the worker processes: all ops that are made here copy,
fill or blend pixels in integers (`cache_service.views.copied`), and every draw is a function of the
recipe and the seed. A run may therefore be resumed with either loader. All views of a seed are
made when an epoch begins; after that a batch takes nothing from the host.
Shape letters: N samples or positions, B batch, E views with a box, H W pixels, S side of a view.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from cachetools import LRUCache
from numpy.typing import NDArray
from torch import Tensor

from cache_service.errors import ConfigError, ViewDriftError
from cache_service.format.codecs import Arrays
from cache_service.human_format import human_bytes
from cache_service.storage import is_url
from cache_service.views.copied import (
    COPYING,
    CopiedViews,
    Erased,
    copy_views,
    frame_images,
    other_ops,
    padding_of,
)
from cache_service.views.draws import ONE
from cache_service.views.identity import digest64
from distill.batches import Batch, BatchPlan, Cursor
from distill.methods import ViewSelection
from distill.replay import Replay
from distill.targets import tensors_of

MAX_BYTES = 2 * 2**30
"""Largest total size of the framed images, and of the views and rows of all loaded seeds."""

NUM_RENDERED = 64
"""Views per seed that are compared with the CPU renderer if no cache records their digests."""

PART_BYTES = 2**23
"""Bytes of the views that are made at a time."""


class _Seed(NamedTuple):
    """All views and rows of one seed on the device, in order of position."""

    views_NSS3: Tensor
    samples_N: Tensor
    partners_N: Tensor
    """Sample that is mixed in; the own one where there is none."""
    weights_N: Tensor
    rows: tuple[dict[str, Tensor], ...]


class _Epoch(NamedTuple):
    """The recorded positions that the places of an epoch read, on the device.

    Attributes:
        epoch: number of the epoch.
        positions_N: positions of the epoch's seed.
        others: for each pairing, the seed and the positions of its views.
    """

    epoch: int
    positions_N: Tensor
    others: dict[str, tuple[int, Tensor]]


class DeviceViews:
    """Makes batches on a device from images and rows in its memory.

    Args:
        replay: dataset, recipe and caches. It also checks views that differ from their digests.
        device: device of the batches.
        num_seeds: number of seeds in memory; 2 if a method compares views of two seeds.
    """

    def __init__(self, replay: Replay, device: torch.device, *, num_seeds: int) -> None:
        self._replay = replay
        self._device = device
        self._recipe = replay.views.recipe
        self._framed_NHW3 = self._upload(frame_images(replay.views))
        self._labels_N = self._upload(np.array(replay.images.labels))
        self._along_S = torch.arange(self._recipe.size, device=device)
        self._seeds: LRUCache[int, _Seed] = LRUCache(num_seeds)
        self._checked_seeds: set[int] = set()
        self._epoch: _Epoch | None = None

    def batches(
        self, plan: BatchPlan, selection: ViewSelection, first_step: int
    ) -> Iterator[Batch]:
        """Iterate over the batches of a plan from a step on.

        Raises:
            SpecMismatchError, ViewDriftError: a view of a seed differs from the recorded one.
        """
        for step in range(first_step, plan.num_steps):
            cursor = plan.cursor(step)
            epoch = self._begin(cursor, plan, selection)
            places = slice(cursor.start, cursor.stop)
            batch = self._batch(cursor, epoch.positions_N[places])
            yield batch._replace(
                other_views={
                    name: self._batch(cursor._replace(seed=seed), others_N[places])
                    for name, (seed, others_N) in epoch.others.items()
                }
            )

    def _begin(self, cursor: Cursor, plan: BatchPlan, selection: ViewSelection) -> _Epoch:
        """Upload the positions of an epoch, unless they are those of the last step."""
        if self._epoch is None or self._epoch.epoch != cursor.epoch:
            at = {"seed": cursor.seed, "epoch": cursor.epoch}
            positions_N = selection.positions(0, plan.num_samples, **at)
            others = selection.other_views(positions_N, **at)
            self._epoch = _Epoch(
                cursor.epoch,
                self._upload(positions_N),
                {name: (seed, self._upload(at_N)) for name, (seed, at_N) in others.items()},
            )
        return self._epoch

    def _batch(self, cursor: Cursor, positions_B: Tensor) -> Batch:
        """Make a batch of the views and rows at these positions of the cursor's seed."""
        seed = self._open(cursor.seed)
        samples_B = seed.samples_N[positions_B]
        return Batch(
            images_BHW3=seed.views_NSS3[positions_B],
            labels_B=self._labels_N[samples_B],
            partner_labels_B=self._labels_N[seed.partners_N[positions_B]],
            weights_B=seed.weights_N[positions_B],
            samples_B=samples_B,
            rows=tuple({k: row[positions_B] for k, row in rows.items()} for rows in seed.rows),
            cursor=cursor,
        )

    def _open(self, seed: int) -> _Seed:
        if seed not in self._seeds:
            if len(self._seeds) == self._seeds.maxsize:
                self._seeds.popitem()  # free its memory before the next seed is loaded
            self._seeds[seed] = self._load(seed)
        return self._seeds[seed]

    def _load(self, seed: int) -> _Seed:
        drawn = copy_views(self._replay.views, seed)
        read = [cache.read(seed, 0, len(drawn.samples_N)) for cache in self._replay.caches]
        checks = seed not in self._checked_seeds
        views = self._make(seed, drawn, read if checks else None)
        self._checked_seeds.add(seed)
        return _Seed(
            views_NSS3=views,
            samples_N=self._upload(drawn.samples_N),
            partners_N=self._upload(drawn.samples_N[drawn.partners_N]),
            weights_N=self._upload(drawn.weights_N),
            rows=tuple(
                {k: row.to(self._device) for k, row in tensors_of(rows, names).items()}
                for rows, names in zip(read, self._replay.array_names, strict=True)
            ),
        )

    def _make(self, seed: int, drawn: CopiedViews, checked: list[Arrays] | None) -> Tensor:
        """Make all views of a seed, uint8 [N, S, S, 3], and compare them with these rows."""
        num_views, size = len(drawn.samples_N), self._recipe.size
        views_NSS3 = torch.empty((num_views, size, size, 3), dtype=torch.uint8, device=self._device)
        # An even number of views, so that the two views of a pair are made together.
        size_of_part = max(2, PART_BYTES // (size * size * 3) // 2 * 2)
        for start in range(0, num_views, size_of_part):
            part = slice(start, min(start + size_of_part, num_views))
            views_NSS3[part] = self._mixed(drawn, part)
            if checked is not None:
                self._check(seed, part, views_NSS3[part], drawn.samples_N[part], checked)
        return views_NSS3

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _mixed(self, drawn: CopiedViews, part: slice) -> Tensor:
        """The views at these positions, uint8 [B, S, S, 3]. Their partners are among them."""
        own_BSS3 = self._unmixed(drawn, part)
        if not self._recipe.mixing:
            return own_BSS3
        partner_BSS3 = own_BSS3[self._upload(drawn.partners_N[part] - part.start)]
        pairs_B5 = self._upload(drawn.pairs_N5[part].astype(np.int32))
        outside_B11, *box_B11 = pairs_B5[:, None, None].unbind(dim=-1)
        # As `cache_service.views.mixing.mix`, in integers: a weight of 1 keeps the pixel, one of 0
        # takes the partner's, so one formula serves both ops.
        weight_BSS1 = torch.where(self._inside(*box_B11), 0, outside_B11).unsqueeze(-1)
        blend_BSS3 = own_BSS3 * weight_BSS1
        blend_BSS3 += partner_BSS3 * (ONE - weight_BSS1)
        blend_BSS3 += ONE // 2
        return (blend_BSS3 >> 16).to(torch.uint8)

    def _unmixed(self, drawn: CopiedViews, part: slice) -> Tensor:
        """The views before mixing, uint8 [B, S, S, 3]."""
        top_B1, left_B1, mirrored_B1 = self._upload(drawn.crops_N3[part])[..., None].unbind(dim=1)
        along_S = self._along_S
        rows_BS = top_B1 + along_S
        columns_BS = left_B1 + torch.where(mirrored_B1 == 1, along_S.flip(0), along_S)
        samples_B11 = self._upload(drawn.samples_N[part, None, None])
        # Indices of shapes [B, 1, 1], [B, S, 1] and [B, 1, S] broadcast to [B, S, S].
        views_BSS3 = self._framed_NHW3[samples_B11, rows_BS[:, :, None], columns_BS[:, None, :]]
        for erased in drawn.erased:
            self._erase(views_BSS3, erased, part)
        return views_BSS3

    def _erase(self, views_BSS3: Tensor, erased: Erased, part: slice) -> None:
        """Fill the boxes of one op, in place."""
        # The host knows which views have a box.
        rows_E = part.start + np.flatnonzero(erased.boxes_N6[part, 2])
        if not len(rows_E):
            return
        top, left, bottom, right, mirrored, first = self._upload(
            erased.boxes_N6[rows_E, None, None]
        ).unbind(dim=-1)
        is_erased_ESS = self._inside(top, left, bottom, right)
        content = self._upload(erased.content_Q3)
        if not erased.is_color:
            column_S = self._along_S
            column_E1S = torch.where(mirrored == 1, right - 1 - column_S, column_S - left)
            index_ESS = first + (column_S[:, None] - top) * (right - left) + column_E1S
            content = content[torch.where(is_erased_ESS, index_ESS, 0)]
        at_E = self._upload(rows_E - part.start)
        views_BSS3[at_E] = torch.where(is_erased_ESS.unsqueeze(-1), content, views_BSS3[at_E])

    def _inside(self, top: Tensor, left: Tensor, bottom: Tensor, right: Tensor) -> Tensor:
        """Whether each pixel is in the box of its view, [B, S, S]; edges are [B, 1, 1]."""
        row_S1, column_S = self._along_S[:, None], self._along_S
        return (row_S1 >= top) & (row_S1 < bottom) & ((column_S >= left) & (column_S < right))

    def _check(
        self,
        seed: int,
        part: slice,
        views_BSS3: Tensor,
        samples_B: NDArray[np.int64],
        read: list[Arrays],
    ) -> None:
        """Compare the views at these positions of a seed with their digests in every cache.

        Views that differ are rendered again on the CPU by `Replay`. It raises an error with the
        cause, or accepts them if the train file allows drift. Without caches, the first views of
        the seed are compared with the CPU renderer.
        """
        num_compared = len(samples_B) if read else NUM_RENDERED - part.start
        if num_compared <= 0:
            return
        on_host = views_BSS3[:num_compared].cpu().numpy()
        # Without recorded digests, all of these views are rendered on the CPU.
        differs_B = np.full(len(on_host), not read)
        if read:
            digests_B = np.array([digest64(view) for view in on_host], np.uint64)
        for rows in read:
            differs_B |= rows["sample"][part] != samples_B
            differs_B |= rows["digest"][part] != digests_B
        if not differs_B.any():
            return
        rendered, _ = self._replay(seed, part.start + np.flatnonzero(differs_B))
        if not np.array_equal(rendered.pixels_BHW3, on_host[differs_B]):
            raise ViewDriftError(
                f"the views of seed {seed} that are made on {self._device} differ from those "
                "that are rendered on the CPU.",
                hint="Use `loader: workers`.",
            )


def why_not_on_device(
    replay: Replay, *, loader: str, num_seeds: int, is_divided_on_cpu: bool = False
) -> str:
    """Return why the views of a run are not made on its device; empty if they are.

    Args:
        replay: dataset, recipe and caches.
        loader: setting of the train file. `auto` uses the device if that is possible and streaming
            is not better; see `_why_streamed`.
        num_seeds: number of seeds from which a batch takes views.
        is_divided_on_cpu: whether several processes train on CPUs.

    Raises:
        ConfigError: `loader: device` is not possible. The message names the reason.
    """
    if loader == "workers":
        return "the train file says so"
    obstacle = _obstacle(replay, num_seeds)
    if obstacle and loader == "device":
        raise ConfigError(
            f"loader: device is not possible here: {obstacle}.",
            hint="Use `loader: auto`, which makes such views in loader processes.",
        )
    if obstacle or loader == "device":
        return obstacle
    if is_divided_on_cpu:
        # On the device, each of them would make the views of all.
        return "each process makes only its part of the views"
    return _why_streamed(replay)


def _why_streamed(replay: Replay) -> str:
    """Return why it is better to read rows and images in small parts; empty if it is not.

    A single process would decode all images, and read all rows of a seed, before the first step.
    """
    if any(is_url(cache.url) for cache in replay.caches):
        return "rows come over a network"
    if any(cache.wait_s > 0 for cache in replay.caches):
        return "rows may still be recorded (wait_s)"
    if max(replay.images.image(0).size) > 2 * replay.views.recipe.size:
        return "images are more than twice as large as their views"
    return ""


def _obstacle(replay: Replay, num_seeds: int) -> str:
    """Return why the views cannot be made on the device; empty if they can."""
    recipe, num_samples = replay.views.recipe, len(replay.images)
    others = other_ops(recipe)
    if others:
        exact = ", ".join(op.model_fields["op"].default for op in COPYING)
        return f"the recipe has {', '.join(others)}, and only {exact} give the same bytes there"
    side = recipe.size + 2 * padding_of(recipe).padding
    # One additional seed, as room for what a load holds besides its result.
    rows = sum(cache.group.layout.row_bytes for cache in replay.caches)
    per_seed = rows + recipe.size**2 * 3
    num_bytes = num_samples * (side**2 * 3 + (num_seeds + 1) * per_seed)
    if num_bytes > MAX_BYTES:
        return (
            f"images, views and rows would take {human_bytes(num_bytes)} on the device, and at "
            f"most {human_bytes(MAX_BYTES)} are used"
        )
    return ""
