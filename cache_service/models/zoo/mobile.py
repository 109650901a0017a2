"""Small networks for CIFAR that save on convolutions: MobileNetV2, ShuffleNetV1 and ShuffleNetV2.

MobileNetV2 at half width (Sandler et al., 2018, Table 2) with these departures of the form that the
distillation papers compare on: plain ReLU in place of ReLU6, channels scaled by truncation, no
dropout, and a second stage of stride 1, so that 32 px end in a 2 x 2 map.

ShuffleNetV1 (Zhang et al., 2018, Table 1, g = 3) behind a pointwise stem without max pooling: three
groups, three stages of stride 2, 4 x 4 map. Weights keep torch's default initialization.

ShuffleNetV2 1x (Ma et al., 2018, Table 5) behind a 1x1 stem without max pooling: three stages of
stride 2, 1024 channels, 4 x 4 map. Weights keep torch's default initialization.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from cache_service.models.zoo.base import CifarNet, conv1x1, init_he, linear, register_cifar

MOBILE_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""(expansion, channels at width 1, blocks, stride of the first block) of each stage."""

MOBILE_WIDTH = 1280
"""Channels of the map. Widths below 1 do not scale it."""


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, linear 1x1 down; a shortcut where the shape is kept."""

    def __init__(self, in_width: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_width * expansion
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.shortcut = stride == 1 and in_width == width
        self.conv = nn.Sequential(
            conv1x1(in_width, hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            depthwise,
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            conv1x1(hidden, width),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_width, H, W] -> [B, width, H / stride, W / stride]."""
        out: Tensor = self.conv(x)
        return x + out if self.shortcut else out


class MobileNetV2(CifarNet):
    """A stem of stride 2, seven stages, and a 1x1 convolution to the map."""

    classifier_name = "classifier.0"

    def __init__(self, *, width: float = 0.5, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(num_features=MOBILE_WIDTH, num_classes=num_classes)
        in_width = int(32 * width)
        stem = nn.Conv2d(in_chans, in_width, 3, stride=2, padding=1, bias=False)
        self.conv1 = nn.Sequential(stem, nn.BatchNorm2d(in_width))
        self.blocks = nn.Sequential()
        for expansion, full_width, num_blocks, stride in MOBILE_STAGES:
            out_width = int(full_width * width)
            stage = nn.Sequential(InvertedResidual(in_width, out_width, stride, expansion))
            for _ in range(num_blocks - 1):
                stage.append(InvertedResidual(out_width, out_width, 1, expansion))
            self.blocks.append(stage)
            in_width = out_width
        self.conv2 = nn.Sequential(conv1x1(in_width, MOBILE_WIDTH), nn.BatchNorm2d(MOBILE_WIDTH))
        # A sequence of one: published checkpoints call the weight `classifier.0.weight`.
        self.classifier = nn.Sequential(linear(MOBILE_WIDTH, num_classes))
        init_he(self, linear_std=0.01)

    def forward_features(self, x_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1280, H / 16, W / 16]."""
        x = relu(self.conv1(x_B3HW), inplace=True)
        return relu(self.conv2(self.blocks(x)), inplace=True)


GROUPS = 3
STEM_WIDTH = 24
SHUFFLE1_STAGES = ((240, 4), (480, 8), (960, 4))
"""(channels, units) of the three stages."""


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave the channel groups: channel (g, c) goes to (c, g)."""
    batch, width, *sides = x.shape
    return x.reshape(batch, groups, width // groups, *sides).transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
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
        super().__init__(num_features=SHUFFLE1_STAGES[-1][0], num_classes=num_classes)
        self.conv1 = conv1x1(in_chans, STEM_WIDTH)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.layer1 = _shuffle1_stage(STEM_WIDTH, *SHUFFLE1_STAGES[0])
        self.layer2 = _shuffle1_stage(SHUFFLE1_STAGES[0][0], *SHUFFLE1_STAGES[1])
        self.layer3 = _shuffle1_stage(SHUFFLE1_STAGES[1][0], *SHUFFLE1_STAGES[2])
        self.linear = linear(self.num_features, num_classes)

    def forward_features(self, x_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 960, H / 8, W / 8]."""
        x = relu(self.bn1(self.conv1(x_B3HW)), inplace=True)
        map_BDHW: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return map_BDHW


def _shuffle1_stage(in_width: int, width: int, num_units: int) -> nn.Sequential:
    return nn.Sequential(
        ShuffleUnit(in_width, width, 2),
        *(ShuffleUnit(width, width, 1) for _ in range(num_units - 1)),
    )


SHUFFLE2_STAGES = ((116, 3), (232, 7), (464, 3))
"""(channels, units of stride 1 behind the one of stride 2) of the three stages."""

SHUFFLE2_WIDTH = 1024


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
        super().__init__(num_features=SHUFFLE2_WIDTH, num_classes=num_classes)
        self.conv1 = conv1x1(in_chans, STEM_WIDTH)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.layer1 = _shuffle2_stage(STEM_WIDTH, *SHUFFLE2_STAGES[0])
        self.layer2 = _shuffle2_stage(SHUFFLE2_STAGES[0][0], *SHUFFLE2_STAGES[1])
        self.layer3 = _shuffle2_stage(SHUFFLE2_STAGES[1][0], *SHUFFLE2_STAGES[2])
        self.conv2 = conv1x1(SHUFFLE2_STAGES[-1][0], SHUFFLE2_WIDTH)
        self.bn2 = nn.BatchNorm2d(SHUFFLE2_WIDTH)
        self.linear = linear(SHUFFLE2_WIDTH, num_classes)

    def forward_features(self, x_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1024, H / 8, W / 8]."""
        x = relu(self.bn1(self.conv1(x_B3HW)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return relu(self.bn2(self.conv2(x)), inplace=True)


def _shuffle2_stage(in_width: int, width: int, num_units: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(in_width, width), *(SplitUnit(width) for _ in range(num_units)))


register_cifar(__name__, MobileNetV2, {"cifar_mobilenetv2": {}}, map_side=2, first_conv="conv1.0")
register_cifar(__name__, ShuffleNetV1, {"cifar_shufflenetv1": {}}, map_side=4)
register_cifar(__name__, ShuffleNetV2, {"cifar_shufflenetv2": {}}, map_side=4)
