"""ResNet-50 for 32 x 32 images: ImageNet's stages behind a 3x3 stem without max pooling, 4 x 4 map.

Source: He et al., Deep Residual Learning, 2016; the CIFAR stem as the distillation papers use it.
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

EXPANSION = 4
"""Output channels of a bottleneck per channel of its 3x3 convolution."""

default_cfgs = cifar_cfgs("cifar_resnet50", map_side=4, classifier="linear")


class Bottleneck(nn.Module):
    """1x1 down, 3x3 (carries the stride), 1x1 up, and a shortcut projected where shapes change."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        out_width = EXPANSION * width
        self.conv1 = conv1x1(in_width, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_width)
        self.bn3 = nn.BatchNorm2d(out_width)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_width != out_width:
            self.shortcut = nn.Sequential(
                conv1x1(in_width, out_width, stride), nn.BatchNorm2d(out_width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_width, H, W] -> [B, 4 * width, H / stride, W / stride]."""
        shortcut = self.shortcut(x)
        x = relu(self.bn1(self.conv1(x)), inplace=True)
        x = relu(self.bn2(self.conv2(x)), inplace=True)
        return relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


class ResNet50(CifarNet):
    """Four stages of 3, 4, 6 and 3 bottlenecks."""

    classifier_name = "linear"

    def __init__(self, *, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(num_features=512 * EXPANSION, num_classes=num_classes)
        self.conv1 = conv3x3(in_chans, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, 1, 3)
        self.layer2 = _stage(256, 128, 2, 4)
        self.layer3 = _stage(512, 256, 2, 6)
        self.layer4 = _stage(1024, 512, 2, 3)
        self.linear = linear(self.num_features, num_classes)
        init_he(self)

    def forward_features(self, x_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 2048, H / 8, W / 8]."""
        x = relu(self.bn1(self.conv1(x_B3HW)), inplace=True)
        map_BDHW: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return map_BDHW


def _stage(in_width: int, width: int, stride: int, num_blocks: int) -> nn.Sequential:
    rest = (Bottleneck(EXPANSION * width, width, 1) for _ in range(num_blocks - 1))
    return nn.Sequential(Bottleneck(in_width, width, stride), *rest)


@register_model
def cifar_resnet50(pretrained: bool = False, **options: Any) -> ResNet50:
    """The ResNet-50 teacher of the CIFAR-100 tables."""
    net: ResNet50 = build_model_with_cfg(ResNet50, "cifar_resnet50", pretrained, **options)
    return net
