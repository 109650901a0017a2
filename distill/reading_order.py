"""The epoch that a dataset gives, and the order in which a loader reads it.

Trainers replace samplers, shuffle, pad and forget epochs. The dataset sees the positions that it is
asked for, so it refuses what would no longer be the recorded order.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info

from cache_service.errors import ConfigError, WorkersError
from cache_service.rows.sampler import PositionSampler


class Turn(NamedTuple):
    """One use of an epoch: from one call of `set_epoch` to the next.

    Attributes:
        epoch: number of the epoch.
        number: counts the calls of `set_epoch`.
        starts: how often the first position has been read.
        ended: whether the last batch has been read.
    """

    epoch: int
    number: int
    starts: int
    ended: int


class Epoch:
    """The number of the current epoch, in memory that loader workers share.

    A worker has a copy of the dataset as it was when the worker started. A persistent worker
    outlives an epoch, so the number reaches it through shared memory. A copy that is pickled by
    other means than torch's, such as `copy.deepcopy`, has an epoch of its own.
    """

    def __init__(self) -> None:
        self._fields = torch.zeros(len(Turn._fields), dtype=torch.int64)
        self._share()

    def _share(self) -> None:
        try:
            self._fields.share_memory_()  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError) as error:
            raise WorkersError(
                f"the number of the epoch cannot be shared with loader workers: {error}.",
                hint="See that /dev/shm is writable (docker run --shm-size=2g).",
            ) from error

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._fields.is_shared():  # type: ignore[no-untyped-call]
            self._share()

    def set(self, epoch: int) -> None:
        """Begin an epoch.

        Raises:
            ConfigError: the number is negative or not whole.
        """
        try:
            number = operator.index(epoch)
        except TypeError:
            number = -1
        if number < 0:
            raise ConfigError(f"set_epoch({epoch!r}) was called; epochs are 0, 1, 2 and so on.")
        turn = self.turn
        self._fields.copy_(torch.tensor(Turn(number, turn.number + 1, 0, 0)))

    @property
    def turn(self) -> Turn:
        """The current use of the epoch."""
        return Turn(*self._fields.tolist())

    def note_start(self) -> None:
        """The first position was read. One worker reads it, so no lock is needed."""
        self._fields[2] += 1

    def note_end(self) -> None:
        """The last batch was read."""
        self._fields[3] = 1


class EpochSampler(PositionSampler):
    """A `PositionSampler` of a dataset, whose `set_epoch` is that of the dataset.

    Lightning calls `set_epoch` of samplers only.
    """

    def __init__(self, epoch: Epoch, num_seeds: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._epoch = epoch
        self._num_seeds = num_seeds
        self._ended_turn: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; see `CachedDataset.set_epoch`."""
        self._epoch.set(epoch)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the positions.

        Raises:
            ConfigError: they were all read before, and `set_epoch` was not called since.
        """
        turn = self._epoch.turn
        if self._ended_turn == turn.number and self._num_seeds > 1:
            raise read_again(turn.epoch)
        yield from super().__iter__()
        self._ended_turn = turn.number


class OrderCheck:
    """Refuses batches that are not the next ones of the recorded epoch.

    Each process checks what it reads: positions of a batch are consecutive, and batches ascend. It
    needs no knowledge of batch size, number of workers or number of processes.

    Args:
        epoch: the epoch that is read.
        num_samples: positions of the epoch.
        num_seeds: number of seeds that the dataset gives in turn.
        mixes: whether neighbors are mixed.
    """

    def __init__(self, epoch: Epoch, *, num_samples: int, num_seeds: int, mixes: bool) -> None:
        self._epoch = epoch
        self._num_samples = num_samples
        self._num_seeds = num_seeds
        self._why = "the recorded order is a shuffle already, it is read in one sequential scan" + (
            ", and neighbors are mixed with each other" if mixes else ""
        )
        self._turn = Turn(-1, -1, 0, 0)
        self._first = 0
        self._latest = 0
        self._next = 0
        self._shares: tuple[int, int | None] = (1, None)

    def divide(self, world: int, batch_size: int | None) -> None:
        """Expect the positions of a sampler that divides the epoch among `world` processes."""
        self._shares = (world, batch_size)

    def check(self, positions: Sequence[int]) -> None:
        """Check the next batch.

        Raises:
            ConfigError: another sampler shuffles, strides or repeats, or the epoch was not set.
        """
        if not is_in_order(positions):
            raise self._refusal(positions)
        turn, first = self._epoch.turn, positions[0]
        if turn.number != self._turn.number:
            if turn.epoch != self._turn.epoch and first >= self._next > 0:
                raise self._changed_halfway(turn, first)
            self._turn, self._first, self._latest, self._next = turn, first, first, first
        goes_back = first < self._next
        if first == 0:
            # Another worker may have read the last batch of a short epoch before this first one.
            if turn.ended and (goes_back or turn.starts) and self._num_seeds > 1:
                raise read_again(turn.epoch)
            self._epoch.note_start()
        if goes_back and first != self._first and not (first == 0 and turn.ended):
            raise self._refusal([self._next - 1, *positions])
        if first - self._latest > self._largest_step():
            raise self._divided_twice(first)
        self._latest = first
        self._next = positions[-1] + 1
        if self._next + len(positions) > self._num_samples:
            self._epoch.note_end()

    def _largest_step(self) -> int:
        """How far the next batch of this worker may begin after its latest one."""
        world, batch_size = self._shares
        if world == 1 or self._next == self._latest:  # any sampler, or nothing was read yet
            return self._num_samples
        worker = get_worker_info()
        step = self._next - self._latest if batch_size is None else world * batch_size
        return step * (1 if worker is None else worker.num_workers)

    def _divided_twice(self, first: int) -> ConfigError:
        return ConfigError(
            f"a batch at position {first} follows the one at {self._latest}, and no process reads "
            f"those between: data.sampler() has divided the epoch among {self._shares[0]} "
            "processes, and the loader divides it again.",
            hint="Where a trainer divides batches itself (accelerator.prepare, Hugging Face "
            "Trainer), leave sampler= out. With data.sampler(), leave in_order=False out.",
        )

    def _changed_halfway(self, turn: Turn, first: int) -> ConfigError:
        return ConfigError(
            f"set_epoch({turn.epoch}) was called while epoch {self._turn.epoch} was read, before "
            f"position {first}: the views would be those of two seeds.",
            hint="Call set_epoch before the iterator of the loader is made, iter(loader).",
        )

    def _refusal(self, positions: Sequence[int]) -> ConfigError:
        at, what, hint = 0, "which is another order", SHUFFLED
        steps = [after - before for before, after in pairwise(positions)]
        back = [index for index, step in enumerate(steps) if step < 0]
        if len(back) == 1 and set(steps) == {1, min(steps)}:
            at, what, hint = back[0], "which begins again", REPEATED
        elif len(set(steps)) == 1 and steps[0] > 1:
            what, hint = f"{steps[0]} apart", STRIDED
        shown = ", ".join(map(str, positions[at : at + 4]))
        return ConfigError(
            f"positions {shown} of epoch {self._epoch.turn.epoch} were asked for, {what}, but "
            f"{self._why}.",
            hint=f"{hint} CachedDataset(order='any') gives any order.",
        )


SHUFFLED = (
    "Use DataLoader(shuffle=False) or sampler=data.sampler() (Hugging Face: TrainingArguments("
    "train_sampling_strategy='sequential'); Lightning: Trainer(use_distributed_sampler=False))."
)
STRIDED = (
    "Give each process its slices by DataLoader(sampler=data.sampler(rank, world, batch_size=...)) "
    "and let no trainer replace it (Lightning: Trainer(use_distributed_sampler=False))."
)
REPEATED = (
    "A loader that fills the last batch with views that were read before, as Accelerate and the "
    "Hugging Face Trainer do by even_batches, needs drop_last=True or dataloader_drop_last=True."
)


def is_in_order(positions: Sequence[int]) -> bool:
    """Whether positions are consecutive."""
    return all(after - before == 1 for before, after in pairwise(positions))


def read_again(epoch: int) -> ConfigError:
    """The refusal of a second reading of an epoch that nobody asked for."""
    return ConfigError(
        f"epoch {epoch} was read to its end and begins again: without set_epoch, every epoch "
        "would give the views of the same seed.",
        hint="Call data.set_epoch(epoch) before each epoch, also to read one again (Lightning: "
        "DataLoader(sampler=data.sampler()), whose set_epoch it calls).",
    )
