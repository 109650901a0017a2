"""Networks that a quick form trains in minutes on a CPU, and one that only a table here needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from torch import nn

from cache_service.models.zoo.base import conv3x3
from cache_service.models.zoo.resnet import ResNet

RESNET = "cli.experiments.reproduce.small_nets:resnet"
RESNET18 = "cli.experiments.reproduce.small_nets:cifar_resnet18"
"""How a config file names these networks."""


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
