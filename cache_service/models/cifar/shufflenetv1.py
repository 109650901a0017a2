"""ShuffleNetV1 for CIFAR: three groups, pointwise stem, three stages of stride 2, 4 x 4 map.

Source: Zhang et al., ShuffleNet, 2018, Table 1 (g = 3), behind a 1x1 stem without max pooling as
the distillation papers use it. Weights keep torch's default initialization, as theirs do.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from cache_service.models.cifar.base import CifarNet, cifar_cfgs, conv1x1, linear

GROUPS = 3
STEM_WIDTH = 24
STAGES = ((240, 4), (480, 8), (960, 4))
"""(channels, units) of the three stages."""

default_cfgs = cifar_cfgs("cifar_shufflenetv1", map_side=4, classifier="linear")


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave the channel groups: channel (g, c) goes to (c, g)."""
    batch, width, *sides = x.shape
    return x.reshape(batch, groups, width // groups, *sides).transpose(1, 2).flatten(1, 2)


class Unit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1.

    At stride 2 the shortcut is a mean pooling that is concatenated, at stride 1 it is added.
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        branch_width = width - in_width if stride == 2 else width
        hidden = branch_width // 4
        # The stem is too narrow to be worth grouping.
        self.groups = 1 if in_width == STEM_WIDTH else GROUPS
        self.stride = stride
        self.conv1 = conv1x1(in_width, hidden, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = conv1x1(hidden, branch_width, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(branch_width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_width, H, W] -> [B, width, H / stride, W / stride]."""
        out = relu(self.bn1(self.conv1(x)), inplace=True)
        out = shuffle_channels(out, self.groups)
        # The published form has a ReLU here that the paper has not.
        out = relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            out = torch.cat([out, avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        else:
            out = out + x
        return relu(out, inplace=True)


class ShuffleNetV1(CifarNet):
    """A pointwise stem and three stages."""

    classifier_name = "linear"

    def __init__(self, *, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(num_features=STAGES[-1][0], num_classes=num_classes)
        self.conv1 = conv1x1(in_chans, STEM_WIDTH)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.layer1 = _stage(STEM_WIDTH, *STAGES[0])
        self.layer2 = _stage(STAGES[0][0], *STAGES[1])
        self.layer3 = _stage(STAGES[1][0], *STAGES[2])
        self.linear = linear(self.num_features, num_classes)

    def forward_features(self, x_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 960, H / 8, W / 8]."""
        x = relu(self.bn1(self.conv1(x_B3HW)), inplace=True)
        map_BDHW: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return map_BDHW


def _stage(in_width: int, width: int, num_units: int) -> nn.Sequential:
    return nn.Sequential(
        Unit(in_width, width, 2), *(Unit(width, width, 1) for _ in range(num_units - 1))
    )


@register_model
def cifar_shufflenetv1(pretrained: bool = False, **options: Any) -> ShuffleNetV1:
    """The ShuffleNetV1 student of the CIFAR-100 tables."""
    net: ShuffleNetV1 = build_model_with_cfg(
        ShuffleNetV1, "cifar_shufflenetv1", pretrained, **options
    )
    return net
