"""Which positions make which batch: a pure function of (epoch plan, step, rank). No torch state.

A run is one line of global batches over recorded epochs. Rank r of w takes the r-th equal slice of
each, and resuming is one integer, the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Cursor(NamedTuple):
    """Where a batch is in its run. `start` and `stop` are this rank's positions."""

    step: int
    epoch: int
    seed: int
    start: int
    stop: int


class Batch(NamedTuple):
    """One batch as the loader hands it over. Shapes: B views, H x W pixels.

    Attributes:
        images_BHW3: uint8 views, byte for byte as the teacher saw them.
        labels_B: int64.
        partner_labels_B: int64, the mixing partner's; the own label where unmixed.
        weights_B: float32 share of the own label; 1.0 where unmixed.
        samples_B: int64 dataset items.
        rows: encoded teacher rows, one dict per cache, keyed by the cache's array names.
        cursor: where in the run.
        other_views: one other view for each of these, by the name of the pairing that chose them
            (`distill.methods.requirements`); empty where no method compares views.
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
        """The same batch on a device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return self.changed(moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; DataLoader calls this where asked to pin."""
        return self.changed(Tensor.pin_memory)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor replaced."""
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
    """The batches of a run.

    Attributes:
        num_samples: positions per recorded epoch.
        batch_size: views per rank and step.
        seeds: recorded epochs, used in turn and again from the first when they run out.
        epochs: how many to train.
        rank: which slice is ours.
        world: how many slices there are.
        min_views: fewest views per rank of an epoch's last step; fewer are left unseen. 2 where a
            network trains, because batch statistics of one view do not exist.
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
        """Steps per epoch, the same on every rank. The last step may be shorter."""
        whole, rest = divmod(self.num_samples, self.batch_size * self.world)
        return max(whole + (rest >= self.world * self.min_views), 1)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def cursor(self, step: int) -> Cursor:
        """This rank's positions at a step.

        All ranks get equally many, so a rest smaller than `world` views ends an epoch unseen.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.batch_size * self.world
        size = min(self.batch_size, (self.num_samples - first) // self.world)
        start = first + self.rank * size
        return Cursor(step, epoch, self.seeds[epoch % len(self.seeds)], start, start + size)
