"""Assigns positions of recorded epochs to batches.

The assignment is a pure function of the plan, the step and the rank. A run is one sequence of
global batches over recorded epochs, of which each rank reads a slice. The step number alone is
therefore enough to resume a run, also on another number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Cursor(NamedTuple):
    """The place of a batch in its run; this rank reads the positions [start, stop)."""

    step: int
    epoch: int
    seed: int
    start: int
    stop: int


class Batch(NamedTuple):
    """One batch as the loader returns it. Shapes: B views, H x W pixels.

    Attributes:
        images_BHW3: uint8 views, with the same bytes that the teacher saw.
        labels_B: int64.
        partner_labels_B: int64, labels of the mixing partners; equal to `labels_B` if a view is
            not mixed.
        weights_B: float32 weight of `labels_B`; 1.0 if a view is not mixed.
        samples_B: int64 indices of the dataset.
        rows: encoded teacher rows, one dict per cache, keyed by the cache's array names.
        cursor: the place of the batch in its run.
        other_views: for each pairing, by its name, a batch with one other view for each view of
            this batch (see `distill.methods.requirements`). Empty if no method compares views.
    """

    images_BHW3: Tensor
    labels_B: Tensor
    partner_labels_B: Tensor
    weights_B: Tensor
    samples_B: Tensor
    rows: tuple[dict[str, Tensor], ...]
    cursor: Cursor
    other_views: dict[str, Batch] = {}  # noqa: RUF012 - never changed in place

    def to(self, device: str, *, non_blocking: bool = True) -> Batch:
        """Copy the batch to a device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return self.changed(moved)

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory. DataLoader calls this if `pin_memory` is set."""
        return self.changed(Tensor.pin_memory)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor of the batch and return the new batch."""
        return Batch(
            images_BHW3=change(self.images_BHW3),
            labels_B=change(self.labels_B),
            partner_labels_B=change(self.partner_labels_B),
            weights_B=change(self.weights_B),
            samples_B=change(self.samples_B),
            rows=tuple({name: change(row) for name, row in rows.items()} for rows in self.rows),
            cursor=self.cursor,
            other_views={name: b.changed(change) for name, b in self.other_views.items()},
        )


class BatchPlan(NamedTuple):
    """The batches of a run. They do not depend on `rank` and `world`; only their slices do.

    Attributes:
        num_samples: positions per recorded epoch.
        batch_size: views per step, of all ranks together.
        seeds: recorded epochs. They are used in order, and repeated if the run has more epochs.
        epochs: number of epochs to train.
        rank: index of the slice that this process reads.
        world: number of slices.
        min_views: smallest number of views in the last step of an epoch. If fewer are left, they
            are skipped. It is 2 for training, because batch norm cannot compute a variance from one
            view.
    """

    num_samples: int
    batch_size: int
    seeds: Sequence[int]
    epochs: int
    rank: int = 0
    world: int = 1
    min_views: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch. The last step may be shorter."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return max(whole + (rest >= self.min_views), 1)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def bounds(self, step: int) -> tuple[int, ...]:
        """Where the slices of a batch begin, and where the last one ends: world + 1 positions.

        Inner bounds are even, so that positions 2k and 2k + 1, which may be mixed with each other,
        are read by one rank. A batch with fewer than two views for each rank is not divided: its
        only slice, which every rank reads, is the whole.
        """
        first = step % self.steps_per_epoch * self.batch_size
        size = min(self.batch_size, self.num_samples - first)
        if size < 2 * self.world:
            return first, first + size
        inner = [(first + size * rank // self.world) // 2 * 2 for rank in range(1, self.world)]
        return first, *inner, first + size

    def is_divided(self, step: int) -> bool:
        """Whether each rank has a slice of its own in the batch of a step."""
        return len(self.bounds(step)) > self.world

    def cursor(self, step: int) -> Cursor:
        """This rank's positions at a step."""
        epoch, bounds = step // self.steps_per_epoch, self.bounds(step)
        place = self.rank if self.is_divided(step) else 0
        seed = self.seeds[epoch % len(self.seeds)]
        return Cursor(step, epoch, seed, bounds[place], bounds[place + 1])
