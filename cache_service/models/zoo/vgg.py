"""VGG for CIFAR: batch-normed 3x3 convolutions, one linear layer behind a mean, 4 x 4 map.

Source: Simonyan and Zisserman, Very Deep Convolutional Networks, 2015; the small forms as the
distillation papers use them, all with batch norms. timm's `vgg13` is the ImageNet network, hence
the prefix.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from cache_service.models.zoo.base import CifarNet, init_he, linear, register_cifar

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of the five blocks."""

LARGE_INPUT = 64
"""Input side in px at which a fourth max pooling keeps the map 4 x 4, as with 32 px."""


class Vgg(CifarNet):
    """Five blocks of `num_convs` convolutions, max pooling after each but the last ones."""

    classifier_name = "classifier"

    def __init__(
        self,
        *,
        num_convs: tuple[int, int, int, int, int],
        num_classes: int = 100,
        in_chans: int = 3,
    ) -> None:
        super().__init__(num_features=WIDTHS[-1], num_classes=num_classes)
        self.block0 = _block(in_chans, WIDTHS[0], num_convs[0])
        self.block1 = _block(WIDTHS[0], WIDTHS[1], num_convs[1])
        self.block2 = _block(WIDTHS[1], WIDTHS[2], num_convs[2])
        self.block3 = _block(WIDTHS[2], WIDTHS[3], num_convs[3])
        self.block4 = _block(WIDTHS[3], WIDTHS[4], num_convs[4])
        self.classifier = linear(WIDTHS[-1], num_classes)
        init_he(self, linear_std=0.01)

    def forward_features(self, x_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 512, H / 8, W / 8]; divided by 16 for 64 px input."""
        large = x_B3HW.shape[2] == LARGE_INPUT
        x = max_pool2d(relu(self.block0(x_B3HW), inplace=True), 2)
        x = max_pool2d(relu(self.block1(x), inplace=True), 2)
        x = max_pool2d(relu(self.block2(x), inplace=True), 2)
        x = relu(self.block3(x), inplace=True)
        x = max_pool2d(x, 2) if large else x
        return relu(self.block4(x), inplace=True)


def _block(in_width: int, width: int, num_convs: int) -> nn.Sequential:
    """Convolution, norm, ReLU, ... without the last ReLU, which `forward_features` applies."""
    layers: list[nn.Module] = []
    for index in range(num_convs):
        conv = nn.Conv2d(width if index else in_width, width, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


register_cifar(
    __name__,
    Vgg,
    {
        "cifar_vgg8": {"num_convs": (1, 1, 1, 1, 1)},
        "cifar_vgg11": {"num_convs": (1, 1, 2, 2, 2)},
        "cifar_vgg13": {"num_convs": (2, 2, 2, 2, 2)},
        "cifar_vgg16": {"num_convs": (2, 2, 3, 3, 3)},
        "cifar_vgg19": {"num_convs": (2, 2, 4, 4, 4)},
    },
    map_side=4,
    first_conv="block0.0",
)
