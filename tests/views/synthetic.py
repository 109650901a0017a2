"""A dataset out of integer arithmetic: the same pixels on every machine, in every version."""

from __future__ import annotations

import numpy as np
from PIL import Image

MIXED_SIZES = ((32, 32), (33, 32), (47, 61), (9, 7), (1, 50), (120, 1), (1, 1), (200, 90))
"""Width and height in turn: square, odd, smaller than the view, one pixel wide or high."""


class SyntheticImages:
    """Gradients, stripes and a checkerboard, another one for each sample."""

    def __init__(self, num_samples=40, sizes=MIXED_SIZES):
        self.num_samples = num_samples
        self.sizes = sizes
        self.num_decoded = 0

    def __len__(self):
        return self.num_samples

    def image(self, sample):
        self.num_decoded += 1
        width, height = self.sizes[sample % len(self.sizes)]
        y, x = np.mgrid[:height, :width]
        red = (x * 255) // max(1, width - 1)
        green = (y * 7 + sample * 31) % 256
        blue = ((x // 3 + y // 5) % 2) * 160 + (x * y + sample) % 90
        return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))
