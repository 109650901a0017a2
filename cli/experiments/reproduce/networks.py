"""Networks that only reproductions need: fully connected ones, and small ones for quick forms.

Shape letters: B batch, C classes, O I outputs and inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cache_service.models.zoo.base import conv3x3
from cache_service.models.zoo.resnet import ResNet


class MaxNormLinear(nn.Linear):
    """A linear layer whose incoming weights have a norm of at most `max_norm` per unit.

    Longer ones are scaled back before they are used or kept, which after each update is projected
    gradient descent. It is done here and not in a training loop, so that it works with any trainer.
    """

    def __init__(self, inputs: int, outputs: int, *, max_norm: float) -> None:
        super().__init__(inputs, outputs)
        self.max_norm = max_norm

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's signature
        """As nn.Linear, with weights within the norm."""
        self.project()
        return super().forward(input)

    @torch.no_grad()
    def project(self) -> None:
        """Scale the rows of the weight [O, I] that are too long back to the norm."""
        self.weight.renorm_(2, 0, self.max_norm)

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> None:
        # No forward pass comes after the last update, and saved weights must be within the norm.
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
    """The network of Hinton, Vinyals and Dean 2015; by default without regularization.

    Args:
        num_classes: logits.
        hidden: units of each hidden layer.
        side: of the square image, px.
        drop_input: probability that a pixel is dropped in training.
        drop_hidden: probability that a hidden unit is dropped in training.
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


def resnet(
    num_classes: int = 100,
    *,
    depth: int = 8,
    widths: Sequence[int] = (8, 8, 16, 32),
) -> ResNet:
    """A CIFAR ResNet of any depth 6n + 2 and any widths of its stem and stages.

    Raises:
        ValueError: no such depth, or not four widths.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth is 8, 14, 20, ..., not {depth}")
    stem, first, second, third = widths
    return ResNet(depth=depth, widths=(stem, first, second, third), num_classes=num_classes)


def cifar_resnet18(num_classes: int = 100, **options: Any) -> nn.Module:
    """ImageNet's ResNet-18 for images of 32 px: a 3x3 stem that does not shrink them."""
    net: Any = timm.create_model("resnet18", num_classes=num_classes, **options)
    net.conv1 = conv3x3(3, net.conv1.out_channels)
    net.maxpool = nn.Identity()
    model: nn.Module = net
    return model
