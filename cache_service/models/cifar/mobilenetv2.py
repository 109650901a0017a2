"""Half-width MobileNetV2 for CIFAR: expansion 6, 1280 last channels, 2 x 2 map.

Source: Sandler et al., MobileNetV2, 2018, Table 2, with these departures of the form that the
distillation papers compare on: plain ReLU in place of ReLU6, channels scaled by truncation, no
dropout, and a second stage of stride 1, so 32 px end in a 2 x 2 map.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torch.nn.functional import relu

from cache_service.models.cifar.base import CifarNet, cifar_cfgs, conv1x1, init_he, linear

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""(expansion, channels at width 1, blocks, stride of the first block) of each stage."""

LAST_WIDTH = 1280
"""Channels of the map. Widths below 1 do not scale it."""

default_cfgs = cifar_cfgs(
    "cifar_mobilenetv2", map_side=2, first_conv="conv1.0", classifier="classifier.0"
)


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
        super().__init__(num_features=LAST_WIDTH, num_classes=num_classes)
        in_width = int(32 * width)
        stem = nn.Conv2d(in_chans, in_width, 3, stride=2, padding=1, bias=False)
        self.conv1 = nn.Sequential(stem, nn.BatchNorm2d(in_width))
        self.blocks = nn.Sequential()
        for expansion, full_width, num_blocks, stride in STAGES:
            out_width = int(full_width * width)
            stage = nn.Sequential(InvertedResidual(in_width, out_width, stride, expansion))
            for _ in range(num_blocks - 1):
                stage.append(InvertedResidual(out_width, out_width, 1, expansion))
            self.blocks.append(stage)
            in_width = out_width
        self.conv2 = nn.Sequential(conv1x1(in_width, LAST_WIDTH), nn.BatchNorm2d(LAST_WIDTH))
        # A sequence of one: published checkpoints call the weight `classifier.0.weight`.
        self.classifier = nn.Sequential(linear(LAST_WIDTH, num_classes))
        init_he(self, linear_std=0.01)

    def forward_features(self, x_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1280, H / 16, W / 16]."""
        x = relu(self.conv1(x_B3HW), inplace=True)
        return relu(self.conv2(self.blocks(x)), inplace=True)


@register_model
def cifar_mobilenetv2(pretrained: bool = False, **options: Any) -> MobileNetV2:
    """The MobileNetV2 student of the CIFAR-100 tables."""
    net: MobileNetV2 = build_model_with_cfg(MobileNetV2, "cifar_mobilenetv2", pretrained, **options)
    return net
