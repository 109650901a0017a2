"""CIFAR ResNets of basic blocks: depth 6n+2, three stages, 8 x 8 map.

Source: He et al., Deep Residual Learning, 2016, section 4.2, with projection shortcuts and the
x4 wide forms that the distillation papers compare on.
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

NARROW = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)
"""Channels of the stem and the three stages. The x4 nets quadruple the stages, double the stem."""

default_cfgs = cifar_cfgs(
    "resnet8x4", "resnet32x4", "resnet20", "resnet32", "resnet56", "resnet110", map_side=8
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_width, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_width != width:
            self.downsample = nn.Sequential(conv1x1(in_width, width, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_width, H, W] -> [B, width, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = relu(self.bn1(self.conv1(x)), inplace=True)
        return relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class ResNet(CifarNet):
    """A stem and three stages of (depth - 2) / 6 basic blocks."""

    def __init__(
        self,
        *,
        depth: int,
        widths: tuple[int, int, int, int],
        num_classes: int = 100,
        in_chans: int = 3,
    ) -> None:
        super().__init__(num_features=widths[3], num_classes=num_classes)
        num_blocks = (depth - 2) // 6
        self.conv1 = conv3x3(in_chans, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[1], 1, num_blocks)
        self.layer2 = _stage(widths[1], widths[2], 2, num_blocks)
        self.layer3 = _stage(widths[2], widths[3], 2, num_blocks)
        self.fc = linear(widths[3], num_classes)
        init_he(self)

    def forward_features(self, x_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, H / 4, W / 4]."""
        x = relu(self.bn1(self.conv1(x_B3HW)), inplace=True)
        map_BDHW: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return map_BDHW


def _stage(in_width: int, width: int, stride: int, num_blocks: int) -> nn.Sequential:
    rest = (BasicBlock(width, width, 1) for _ in range(num_blocks - 1))
    return nn.Sequential(BasicBlock(in_width, width, stride), *rest)


def _build(
    variant: str, pretrained: bool, depth: int, widths: tuple[int, int, int, int], options: Any
) -> ResNet:
    net: ResNet = build_model_with_cfg(
        ResNet, variant, pretrained, depth=depth, widths=widths, **options
    )
    return net


@register_model
def resnet8x4(pretrained: bool = False, **options: Any) -> ResNet:
    """Depth 8, 256 channels: the usual student of resnet32x4."""
    return _build("resnet8x4", pretrained, 8, WIDE, options)


@register_model
def resnet32x4(pretrained: bool = False, **options: Any) -> ResNet:
    """Depth 32, 256 channels."""
    return _build("resnet32x4", pretrained, 32, WIDE, options)


@register_model
def resnet20(pretrained: bool = False, **options: Any) -> ResNet:
    """Depth 20, 64 channels."""
    return _build("resnet20", pretrained, 20, NARROW, options)


@register_model
def resnet32(pretrained: bool = False, **options: Any) -> ResNet:
    """Depth 32, 64 channels."""
    return _build("resnet32", pretrained, 32, NARROW, options)


@register_model
def resnet56(pretrained: bool = False, **options: Any) -> ResNet:
    """Depth 56, 64 channels."""
    return _build("resnet56", pretrained, 56, NARROW, options)


@register_model
def resnet110(pretrained: bool = False, **options: Any) -> ResNet:
    """Depth 110, 64 channels."""
    return _build("resnet110", pretrained, 110, NARROW, options)
