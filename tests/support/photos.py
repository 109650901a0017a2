"""A folder of JPEG files as users have it: scikit-learn's digits, one folder a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 16
"""Side of the images, px; they are 8 x 8 in scikit-learn."""


def write_photos(root: Path, *, digits: tuple[int, ...] = (0, 1, 4), count: int = 30) -> Path:
    """Write the first `count` images of some digits as root/digit-N/M.jpg."""
    data = load_digits()
    for digit in digits:
        folder = root / f"digit-{digit}"
        folder.mkdir(parents=True)
        images = data.images[data.target == digit][:count]
        for number, image_HW in enumerate(images):
            pixels = Image.fromarray(np.rint(image_HW * (255 / 16)).astype(np.uint8))
            pixels.resize((SIDE, SIDE)).convert("RGB").save(folder / f"{number}.jpg", quality=95)
    return root
