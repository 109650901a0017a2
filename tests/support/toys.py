"""Tiny real things for end-to-end tests: a learnable dataset and a small network, by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

NUM_CLASSES = 5


class Patches:
    """Noisy images whose class is where the bright patch is; `num_samples` of them, 16 x 16."""

    def __init__(
        self,
        num_samples: int = 96,
        side: int = 16,
        salt: int = 0,
        num_classes: int = NUM_CLASSES,
        prefix: str = "place",
    ) -> None:
        # Classes beyond the first few have no samples; they only make answers wide.
        self.classes = tuple(f"{prefix}{i}" for i in range(num_classes))
        rng = np.random.default_rng(salt)
        self.targets = [int(label) for label in np.arange(num_samples) % NUM_CLASSES]
        self._images = rng.integers(0, 90, (num_samples, side, side, 3), dtype=np.uint8)
        for image, label in zip(self._images, self.targets, strict=True):
            row, column = divmod(label * 3, side - 6)
            image[row : row + 6, column : column + 6] += 150

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images[index]), self.targets[index]


def patches(**arguments: Any) -> Patches:
    return Patches(**arguments)


class TinyNet(nn.Module):
    """A convolution, a map of side / 4, a linear head; timm's method names."""

    def __init__(self, num_classes: int = NUM_CLASSES, width: int = 12) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, num_classes)

    def forward_features(self, images_B3HW: Tensor) -> Tensor:
        return self.stem(images_B3HW)

    def forward_head(self, map_BDHW: Tensor) -> Tensor:
        return self.head(map_BDHW.mean(dim=(2, 3)))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images_B3HW))


def tiny_net(num_classes: int = NUM_CLASSES, width: int = 12, scale: float = 20.0) -> TinyNet:
    """A TinyNet of fixed random weights; `scale` spreads its logits over several nats."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        net = TinyNet(num_classes, width)
        with torch.no_grad():
            net.head.weight.mul_(scale)
    return net


def net_of_2() -> TinyNet:
    return tiny_net(2)


def net_of_10() -> TinyNet:
    return tiny_net(10)


class Levels(nn.Module):
    """Answers class n for views whose red value is 8 n."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("level", torch.arange(num_classes) * 8.0)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        red_B = images_B3HW[:, 0].mean((1, 2)) * 255
        return -((red_B[:, None] - self.level) ** 2)


def levels(num_classes: int) -> Levels:
    return Levels(num_classes)
