"""Residual networks for 32 x 32 images: basic blocks, bottlenecks, and wide pre-activation blocks.

Sources: He et al., Deep Residual Learning, 2016, section 4.2 (depth 6n+2, three stages, 8 x 8 map)
with projection shortcuts and the x4 wide forms that the distillation papers compare on; its
ResNet-18 and ResNet-50 behind a 3x3 stem without max pooling (4 x 4 map), as the same papers use
them; the pre-activation ResNet-18 of the self-distillation papers (He et al., Identity Mappings,
2016, with the departures named at its block); Zagoruyko and Komodakis, Wide Residual Networks, 2016
(depth 6n+4, no dropout, 8 x 8 map).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu

from cache_service.models.zoo.base import (
    CifarNet,
    conv1x1,
    conv3x3,
    init_he,
    linear,
    register_cifar,
)

NARROW = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)
"""Channels of the stem and the three stages. The x4 nets quadruple the stages, double the stem."""


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


class ShortcutBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that is named `shortcut` in published checkpoints."""

    expansion = 1

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_width, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_width, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_width, H, W] -> [B, width, H / stride, W / stride]."""
        shortcut = self.shortcut(x)
        x = relu(self.bn1(self.conv1(x)), inplace=True)
        return relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class Bottleneck(nn.Module):
    """1x1 down, 3x3 (carries the stride), 1x1 up, and a shortcut projected where shapes change."""

    expansion = 4
    """Output channels per channel of the 3x3 convolution."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        out_width = self.expansion * width
        self.conv1 = conv1x1(in_width, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_width)
        self.bn3 = nn.BatchNorm2d(out_width)
        self.shortcut = _shortcut(in_width, out_width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_width, H, W] -> [B, 4 * width, H / stride, W / stride]."""
        shortcut = self.shortcut(x)
        x = relu(self.bn1(self.conv1(x)), inplace=True)
        x = relu(self.bn2(self.conv2(x)), inplace=True)
        return relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


def _shortcut(in_width: int, width: int, stride: int) -> nn.Sequential:
    """The identity, or a projection where the shape changes."""
    if stride == 1 and in_width == width:
        return nn.Sequential()
    return nn.Sequential(conv1x1(in_width, width, stride), nn.BatchNorm2d(width))


class ActivatedBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions, as CS-KD and PS-KD train it.

    The *activated* input takes the shortcut, also where the shape is kept: in the paper the raw
    input passes through there.
    """

    expansion = 1

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = conv3x3(in_width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_width != width:
            self.shortcut.append(conv1x1(in_width, width, stride))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_width, H, W] -> [B, width, H / stride, W / stride], not activated."""
        active = relu(self.bn1(x))
        shortcut: Tensor = self.shortcut(active)
        out: Tensor = self.conv2(relu(self.bn2(self.conv1(active)), inplace=True))
        return out + shortcut


class DeepResNet(CifarNet):
    """A stem of 64 channels and four stages of `num_blocks` blocks each."""

    classifier_name = "linear"

    def __init__(
        self,
        *,
        block: type[ShortcutBlock | Bottleneck | ActivatedBlock],
        num_blocks: tuple[int, int, int, int],
        num_classes: int = 100,
        in_chans: int = 3,
    ) -> None:
        super().__init__(num_features=512 * block.expansion, num_classes=num_classes)
        self.conv1 = conv3x3(in_chans, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _deep_stage(block, 64, 64, 1, num_blocks[0])
        self.layer2 = _deep_stage(block, 64 * block.expansion, 128, 2, num_blocks[1])
        self.layer3 = _deep_stage(block, 128 * block.expansion, 256, 2, num_blocks[2])
        self.layer4 = _deep_stage(block, 256 * block.expansion, 512, 2, num_blocks[3])
        self.linear = linear(self.num_features, num_classes)
        if block is not ActivatedBlock:  # that one is published with torch's own initialization
            init_he(self)

    def forward_features(self, x_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, H / 8, W / 8]; of `ActivatedBlock`s not activated."""
        x = relu(self.bn1(self.conv1(x_B3HW)), inplace=True)
        map_BDHW: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return map_BDHW


def _deep_stage(
    block: type[ShortcutBlock | Bottleneck | ActivatedBlock],
    in_width: int,
    width: int,
    stride: int,
    num_blocks: int,
) -> nn.Sequential:
    rest = (block(block.expansion * width, width, 1) for _ in range(num_blocks - 1))
    return nn.Sequential(block(in_width, width, stride), *rest)


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


class WideStage(nn.Module):
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
        self.block1 = WideStage(16, 16 * widen, 1, num_blocks)
        self.block2 = WideStage(16 * widen, 32 * widen, 2, num_blocks)
        self.block3 = WideStage(32 * widen, 64 * widen, 2, num_blocks)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = linear(64 * widen, num_classes)
        init_he(self)
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.bias)

    def forward_features(self, x_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, H / 4, W / 4]."""
        x = self.block3(self.block2(self.block1(self.conv1(x_B3HW))))
        return relu(self.bn1(x), inplace=True)


register_cifar(
    __name__,
    ResNet,
    {
        "resnet8x4": {"depth": 8, "widths": WIDE},
        "resnet32x4": {"depth": 32, "widths": WIDE},
        "resnet8": {"depth": 8, "widths": NARROW},
        "resnet14": {"depth": 14, "widths": NARROW},
        "resnet20": {"depth": 20, "widths": NARROW},
        "resnet32": {"depth": 32, "widths": NARROW},
        "resnet44": {"depth": 44, "widths": NARROW},
        "resnet56": {"depth": 56, "widths": NARROW},
        "resnet110": {"depth": 110, "widths": NARROW},
    },
    map_side=8,
)
register_cifar(
    __name__,
    DeepResNet,
    {
        "cifar_resnet18": {"block": ShortcutBlock, "num_blocks": (2, 2, 2, 2)},
        "cifar_resnet50": {"block": Bottleneck, "num_blocks": (3, 4, 6, 3)},
        "cifar_preact_resnet18": {"block": ActivatedBlock, "num_blocks": (2, 2, 2, 2)},
    },
    map_side=4,
)
register_cifar(
    __name__,
    WideResNet,
    {
        "wrn_16_1": {"depth": 16, "widen": 1},
        "wrn_16_2": {"depth": 16, "widen": 2},
        "wrn_40_1": {"depth": 40, "widen": 1},
        "wrn_40_2": {"depth": 40, "widen": 2},
    },
    map_side=8,
)
