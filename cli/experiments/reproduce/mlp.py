"""The fully connected networks of Hinton, Vinyals and Dean 2015: any widths, dropout, max-norm.

Shape letters: B batch, C classes, O I outputs and inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

FACTORY = "cli.experiments.reproduce.mlp:mlp"
"""How a config file names these networks."""


class MaxNormLinear(nn.Linear):
    """A linear layer whose incoming weights have a norm of at most `max_norm` per unit.

    Longer ones are scaled back before they are used or kept, which after each update is projected
    gradient descent. It is done here, not in a training loop, so that any trainer obeys it.
    """

    def __init__(self, inputs: int, outputs: int, *, max_norm: float) -> None:
        super().__init__(inputs, outputs)
        self.max_norm = max_norm

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's signature
        """As nn.Linear, with weights that keep to the norm."""
        self.project()
        return super().forward(input)

    @torch.no_grad()
    def project(self) -> None:
        """Scale the rows of the weight [O, I] that are too long back to the norm."""
        self.weight.renorm_(2, 0, self.max_norm)

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> None:
        # The last update has no forward pass after it; what is kept must keep to the norm too.
        self.project()
        super()._save_to_state_dict(*arguments, **options)


class MLP(nn.Module):
    """Linear layers with ReLU between them, on the first channel of the image."""

    def __init__(
        self,
        widths: Sequence[int],
        *,
        drop_input: float,
        drop_hidden: float,
        max_norm: float | None,
    ) -> None:
        super().__init__()
        self.num_classes = widths[-1]
        layers: list[nn.Module] = [nn.Dropout(drop_input)]
        for inputs, outputs in pairwise(widths):
            if len(layers) > 1:
                layers += [nn.ReLU(), nn.Dropout(drop_hidden)]
            layers.append(
                nn.Linear(inputs, outputs)
                if max_norm is None
                else MaxNormLinear(inputs, outputs, max_norm=max_norm)
            )
        self.layers = nn.Sequential(*layers)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits [B, C]. The three channels of a grey image are one and the same."""
        logits_BC: Tensor = self.layers(images_B3HW[:, 0].flatten(1))
        return logits_BC


def mlp(
    num_classes: int = 10,
    *,
    hidden: Sequence[int] = (800, 800),
    side: int = 28,
    drop_input: float = 0.0,
    drop_hidden: float = 0.0,
    max_norm: float | None = None,
) -> MLP:
    """A network with ReLU layers of the widths `hidden`; by default without regularization.

    Args:
        num_classes: logits.
        hidden: units of each hidden layer.
        side: of the square image, px.
        drop_input: share of pixels dropped in training.
        drop_hidden: share of hidden units dropped in training.
        max_norm: bound on the norm of each unit's incoming weights; none by default.

    Raises:
        ValueError: `max_norm` is not above 0.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    return MLP(
        (side * side, *hidden, num_classes),
        drop_input=drop_input,
        drop_hidden=drop_hidden,
        max_norm=max_norm,
    )
