"""Classes in groups that are easily told apart, and within a group hardly; and a narrow network."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

GROUPS = ((0, 3), (1, 4), (2, 5))
SIDE = 8


class Groups:
    """8 x 8 noise with a bright column for the group and one of two faint rows for the class."""

    def __init__(self, num_samples: int = 600, salt: int = 0) -> None:
        self.classes = tuple("abcdef")
        rng = np.random.default_rng(salt)
        self.targets = [int(label) for label in rng.integers(0, 6, num_samples)]
        self._images = rng.integers(0, 100, (num_samples, SIDE, SIDE, 3), dtype=np.uint8)
        for image, label in zip(self._images, self.targets, strict=True):
            group = next(index for index, members in enumerate(GROUPS) if label in members)
            image[:, 3 * group] += 120
            image[2 * group + GROUPS[group].index(label)] += 22

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images[index]), self.targets[index]


def groups(**arguments: Any) -> Groups:
    return Groups(**arguments)


class Narrow(nn.Module):
    """Linear, through fewer channels than it takes to tell all classes apart."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(3 * SIDE * SIDE, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.head(self.hidden(images_B3HW.flatten(1)))


def narrow(num_classes: int = 6, width: int = 3) -> Narrow:
    return Narrow(num_classes, width)
