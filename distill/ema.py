"""An exponential moving average of a student's weights, to evaluate and to keep."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, nn


class WeightAverage:
    """`average <- decay * average + (1 - decay) * weights`, once per update.

    Running statistics of norms are averaged like weights; whole numbers, such as their counters,
    are copied. The average starts at the initial weights, so choose a decay whose memory,
    1 / (1 - decay) updates, is short against the run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights in."""
        averages: list[Tensor] = []
        weights: list[Tensor] = []
        # Not by state dict: a tensor shared by two layers is listed there twice.
        for average, present in chain(
            zip(self.model.parameters(), model.parameters(), strict=True),
            zip(self.model.buffers(), model.buffers(), strict=True),
        ):
            if average.is_floating_point():
                averages.append(average)
                weights.append(present)
            else:
                average.copy_(present)
        torch._foreach_lerp_(averages, weights, 1 - self._decay)
