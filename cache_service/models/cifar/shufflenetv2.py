"""ShuffleNetV2 1x for CIFAR: pointwise stem, three stages of stride 2, 1024 channels, 4 x 4 map.

Source: Ma et al., ShuffleNet V2, 2018, Table 5 (1x), behind a 1x1 stem without max pooling as the
distillation papers use it. Weights keep torch's default initialization, as theirs do.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torch.nn.functional import relu

from cache_service.models.cifar.base import CifarNet, cifar_cfgs, conv1x1, linear
from cache_service.models.cifar.shufflenetv1 import shuffle_channels

STEM_WIDTH = 24
STAGES = ((116, 3), (232, 7), (464, 3))
"""(channels, units of stride 1 behind the one of stride 2) of the three stages."""

LAST_WIDTH = 1024

default_cfgs = cifar_cfgs("cifar_shufflenetv2", map_side=4, classifier="linear")


def _depthwise(width: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)


class SplitUnit(nn.Module):
    """One half of the channels passes, the other is convolved; then both are interleaved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _depthwise(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, H, W] -> the same shape."""
        kept, out = x.chunk(2, dim=1)
        out = relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        out = relu(self.bn3(self.conv3(out)), inplace=True)
        return shuffle_channels(torch.cat([kept, out], dim=1), 2)


class DownUnit(nn.Module):
    """Two convolved branches of stride 2, interleaved: half the side, `width` channels."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = _depthwise(in_width, 2)
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv2 = conv1x1(in_width, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(in_width, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_width, H, W] -> [B, width, H / 2, W / 2]."""
        left = self.bn1(self.conv1(x))
        left = relu(self.bn2(self.conv2(left)), inplace=True)
        right = relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = relu(self.bn5(self.conv5(right)), inplace=True)
        return shuffle_channels(torch.cat([left, right], dim=1), 2)


class ShuffleNetV2(CifarNet):
    """A pointwise stem, three stages, and a 1x1 convolution to the map."""

    classifier_name = "linear"

    def __init__(self, *, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(num_features=LAST_WIDTH, num_classes=num_classes)
        self.conv1 = conv1x1(in_chans, STEM_WIDTH)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.layer1 = _stage(STEM_WIDTH, *STAGES[0])
        self.layer2 = _stage(STAGES[0][0], *STAGES[1])
        self.layer3 = _stage(STAGES[1][0], *STAGES[2])
        self.conv2 = conv1x1(STAGES[-1][0], LAST_WIDTH)
        self.bn2 = nn.BatchNorm2d(LAST_WIDTH)
        self.linear = linear(LAST_WIDTH, num_classes)

    def forward_features(self, x_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1024, H / 8, W / 8]."""
        x = relu(self.bn1(self.conv1(x_B3HW)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return relu(self.bn2(self.conv2(x)), inplace=True)


def _stage(in_width: int, width: int, num_units: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(in_width, width), *(SplitUnit(width) for _ in range(num_units)))


@register_model
def cifar_shufflenetv2(pretrained: bool = False, **options: Any) -> ShuffleNetV2:
    """The ShuffleNetV2 student of the CIFAR-100 tables."""
    net: ShuffleNetV2 = build_model_with_cfg(
        ShuffleNetV2, "cifar_shufflenetv2", pretrained, **options
    )
    return net
