"""CIFAR-100 from lossless strips, one a class, as an ordinary map-style dataset.

Layout: ROOT/classes.txt (one name a line; the line number is the fine label) and
ROOT/<split>/<class>.webp, each the images of one class, 32 x 32, below one another.

    dataset: {name: examples/cifar100_strips.py:train, root: data/cifar100}

With `args: {count: 2000}` only the first 2,000 images, the same number of each class, for a try.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray

SIDE = 32  # px


class Strips:
    """Images and labels of one split, classes interleaved: image i of each class, then i + 1."""

    def __init__(self, root: str, split: str, count: int | None = None) -> None:
        folder = Path(root)
        self.classes = (folder / "classes.txt").read_text().split()
        strips = [_read_strip(folder / split / f"{name}.webp") for name in self.classes]
        place = np.concatenate([np.arange(len(strip)) for strip in strips])
        labels = np.repeat(np.arange(len(strips)), [len(strip) for strip in strips])
        order = np.lexsort((labels, place))[:count]
        self.targets: list[int] = labels[order].tolist()
        self._pixels_NHW3 = np.concatenate(strips)[order]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        """The image and its fine label."""
        return PIL.Image.fromarray(self._pixels_NHW3[index]), self.targets[index]


def train(root: str, count: int | None = None) -> Strips:
    """The 50,000 training images, or the first `count`."""
    return Strips(root, "train", count)


def test(root: str, count: int | None = None) -> Strips:  # noqa: PT028  a split, not a test
    """The 10,000 test images, or the first `count`."""
    return Strips(root, "test", count)


def _read_strip(path: Path) -> NDArray[np.uint8]:
    """Pixels [n, 32, 32, 3] of one class."""
    with PIL.Image.open(path) as strip:
        return np.asarray(strip.convert("RGB")).reshape(-1, SIDE, SIDE, 3)
