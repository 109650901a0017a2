"""Named numbers on the device, and their means over an epoch: nothing waits until they are read.

Shape letter: V named values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Named(NamedTuple):
    """Numbers by name, as one vector: a GPU does them all in one go, and hands them over in one.

    Attributes:
        names: what they are.
        values_V: float32 or wider.
    """

    names: tuple[str, ...]
    values_V: Tensor

    def floats(self) -> dict[str, float]:
        """The numbers on the host. Waits for the device."""
        return dict(zip(self.names, self.values_V.tolist(), strict=True))


def name_values(tensors: dict[str, Tensor]) -> Named:
    """Detached () tensors as one float32 vector."""
    values = [value.detach().float() for value in tensors.values()]
    return Named(tuple(tensors), torch.stack(values))


class EpochTotals:
    """Running means, weighted by the views behind them.

    They are part of a checkpoint, so that the epoch in which a run was stopped reports all its
    views.
    """

    def __init__(self) -> None:
        self.num_views = 0
        self._sums: Named | None = None

    def add(self, means: Named, num_views: int) -> None:
        """Take in the means over some views."""
        sums_V = means.values_V.double() * num_views
        if self._sums is not None:
            assert self._sums.names == means.names, "a method reports the same names every time"
            sums_V += self._sums.values_V
        self._sums = Named(means.names, sums_V)
        self.num_views += num_views

    def means(self) -> dict[str, float]:
        """Means over everything taken in."""
        sums = self._sums.floats() if self._sums is not None else {}
        return {name: value / self.num_views for name, value in sums.items()}

    def clear(self) -> None:
        """Begin another epoch."""
        self.num_views = 0
        self._sums = None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        sums = None if self._sums is None else [list(self._sums.names), self._sums.values_V]
        return {"num_views": self.num_views, "sums": sums}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a checkpoint."""
        self.num_views = state["num_views"]
        self._sums = None
        if state["sums"] is not None:
            names, values_V = state["sums"]
            self._sums = Named(tuple(names), values_V.to(device))
