"""Wide residual networks for CIFAR: depth 6n+4, pre-activation blocks, no dropout, 8 x 8 map.

Source: Zagoruyko and Komodakis, Wide Residual Networks, 2016.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torch.nn.functional import relu

from cache_service.models.cifar.base import (
    CifarNet,
    cifar_cfgs,
    conv1x1,
    conv3x3,
    init_he,
    linear,
)

default_cfgs = cifar_cfgs("wrn_16_2", "wrn_40_1", "wrn_40_2", map_side=8)


class PreActBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions.

    Where the width changes, the shortcut is a bare 1x1 convolution of the *activated* input; where
    it does not, the raw input passes through.
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = conv3x3(in_width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.convShortcut = conv1x1(in_width, width, stride) if in_width != width else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_width, H, W] -> [B, width, H / stride, W / stride]."""
        active = relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        out: Tensor = relu(self.bn2(self.conv1(active)), inplace=True)
        out = self.conv2(out)
        return out + shortcut


class Stage(nn.Module):
    """Blocks of one width, under the name `layer` that published checkpoints use."""

    def __init__(self, in_width: int, width: int, stride: int, num_blocks: int) -> None:
        super().__init__()
        rest = (PreActBlock(width, width, 1) for _ in range(num_blocks - 1))
        self.layer = nn.Sequential(PreActBlock(in_width, width, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_width, H, W] -> [B, width, H / stride, W / stride]."""
        out: Tensor = self.layer(x)
        return out


class WideResNet(CifarNet):
    """A stem of 16 channels, three stages of (depth - 4) / 6 blocks, a last norm and ReLU."""

    def __init__(
        self, *, depth: int, widen: int, num_classes: int = 100, in_chans: int = 3
    ) -> None:
        super().__init__(num_features=64 * widen, num_classes=num_classes)
        num_blocks = (depth - 4) // 6
        self.conv1 = conv3x3(in_chans, 16)
        self.block1 = Stage(16, 16 * widen, 1, num_blocks)
        self.block2 = Stage(16 * widen, 32 * widen, 2, num_blocks)
        self.block3 = Stage(32 * widen, 64 * widen, 2, num_blocks)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = linear(64 * widen, num_classes)
        init_he(self)
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.bias)

    def forward_features(self, x_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, H / 4, W / 4]."""
        x = self.block3(self.block2(self.block1(self.conv1(x_B3HW))))
        return relu(self.bn1(x), inplace=True)


def _build(variant: str, pretrained: bool, depth: int, widen: int, options: Any) -> WideResNet:
    net: WideResNet = build_model_with_cfg(
        WideResNet, variant, pretrained, depth=depth, widen=widen, **options
    )
    return net


@register_model
def wrn_16_2(pretrained: bool = False, **options: Any) -> WideResNet:
    """Depth 16, width 2."""
    return _build("wrn_16_2", pretrained, 16, 2, options)


@register_model
def wrn_40_1(pretrained: bool = False, **options: Any) -> WideResNet:
    """Depth 40, width 1."""
    return _build("wrn_40_1", pretrained, 40, 1, options)


@register_model
def wrn_40_2(pretrained: bool = False, **options: Any) -> WideResNet:
    """Depth 40, width 2."""
    return _build("wrn_40_2", pretrained, 40, 2, options)
