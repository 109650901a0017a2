"""Which positions of a recorded epoch each of several processes reads. No torch.

Any loader that takes an iterable of positions can use it, such as torch's DataLoader.
"""

from __future__ import annotations

from collections.abc import Iterator

from cache_service.errors import ConfigError

MIN_VIEWS = 2
"""A last batch with fewer views per process is skipped, as in `kd-cache train`, because batch norm
cannot compute a variance from one view."""


class PositionSampler:
    """The positions that one of several processes reads, in recorded order.

    A pure function of its arguments. Every process gets the same number of positions, each position
    goes to one process at most, and what cannot be divided equally at the end of the epoch is
    skipped. Iterate over it as often as you like.

    Args:
        num_samples: positions of a recorded epoch.
        rank: index of this process.
        world: number of processes.
        batch_size: views per process and step. If set, step by step the processes read neighboring
            slices, which together are the batch that one process with `world * batch_size` views
            would read. If not set, each process reads one contiguous part of the epoch, so that
            each stored shard is read by as few processes as possible.
        pairs: whether positions 2k and 2k+1 are mixed with each other. They then stay together,
            because a process that reads one of them must render both.

    Raises:
        ConfigError: the rank is not one of `world`, nothing is left for a process, or slices of
            `batch_size` views would cut pairs.
    """

    def __init__(
        self,
        num_samples: int,
        rank: int = 0,
        world: int = 1,
        *,
        batch_size: int | None = None,
        pairs: bool = False,
    ) -> None:
        if not 0 <= rank < world:
            raise ConfigError(
                f"rank {rank} of {world} processes was requested; ranks are 0 to {world - 1}."
            )
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} was requested; it is 1 or more.")
        unit = 2 if pairs and world > 1 else 1
        if batch_size is not None and batch_size % unit:
            raise ConfigError(
                f"batch_size={batch_size} on {world} processes would cut pairs of views that are "
                "mixed with each other.",
                hint="Use an even batch_size.",
            )
        if num_samples < world * unit:
            raise ConfigError(f"{num_samples} positions cannot be divided among {world} processes.")
        self.rank, self.world, self.batch_size = rank, world, batch_size
        self._num_samples, self._unit = num_samples, unit

    def __iter__(self) -> Iterator[int]:
        """Iterate over the positions."""
        for start, stop in self.slices():
            yield from range(start, stop)

    def __len__(self) -> int:
        """Number of positions, the same for every rank."""
        return sum(stop - start for start, stop in self.slices())

    def slices(self) -> Iterator[tuple[int, int]]:
        """Iterate over ranges [start, stop) of positions: one per step if `batch_size` is set."""
        size = self.batch_size or self._num_samples
        for first in range(0, self._num_samples, size * self.world):
            share = min(size, (self._num_samples - first) // self.world)
            share -= share % self._unit
            if first and share < min(size, MIN_VIEWS):
                return
            start = first + self.rank * share
            yield start, start + share
