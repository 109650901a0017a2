"""A small image folder, and the real data where it is present."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

CLASSES = ("ant", "bee", "cow")


@pytest.fixture
def folder(tmp_path):
    """Three classes of four 12 x 10 PNGs, written in an order that is not sorted."""
    root = tmp_path / "images"
    pixels = np.random.default_rng(0)
    for name in reversed(CLASSES):
        (root / name).mkdir(parents=True)
        for number in (3, 0, 2, 1):
            image = pixels.integers(0, 256, (10, 12, 3), np.uint8)
            PIL.Image.fromarray(image).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def real_data():
    """Folder of mnist/, cifar100/ and imagenet-64/, from KD_CACHE_DATA or beside the project."""
    here = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("KD_CACHE_DATA", here.parent / "shared" / "data"))
    if not data.is_dir():
        pytest.skip(f"no real data in {data}; set KD_CACHE_DATA to test with it")
    return data
