"""A drawn CIFAR: strips of images whose class is a color. Small, and learnable in a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
COLORS = ((170, 0, 0), (0, 170, 0), (0, 0, 170), (120, 120, 0), (0, 120, 120), (120, 0, 120))


def write_strips(
    folder: Path, *, num_classes: int = 3, num_train: int = 16, num_test: int = 4
) -> Path:
    """classes.txt and <part>/<class>.webp, with so many images a class."""
    names = [f"color{label}" for label in range(num_classes)]
    for part, count, salt in (("train", num_train, 1), ("test", num_test, 2)):
        (folder / part).mkdir(parents=True)
        rng = np.random.default_rng(salt)
        for name, color in zip(names, COLORS, strict=False):
            strip = rng.integers(0, 80, (count, SIDE, SIDE, 3), dtype=np.uint8)
            strip += np.array(color, np.uint8)
            image = Image.fromarray(strip.reshape(-1, SIDE, 3))
            image.save(folder / part / f"{name}.webp", lossless=True, quality=0)
    (folder / "classes.txt").write_text("\n".join(names) + "\n")
    return folder
