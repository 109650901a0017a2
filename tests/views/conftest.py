"""Images to make views of: synthetic ones always, real JPEGs where a folder of them is named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cache_service.format.recipe import AugmentConfig
from cache_service.plugins import load_object
from cache_service.views.draws import draw_words

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def synthetic():
    """The class `SyntheticImages`, from the file that other processes load it from too."""
    return load_object(f"{HERE / 'synthetic.py'}:SyntheticImages")


@pytest.fixture(scope="session")
def real_jpegs():
    """Paths of real JPEGs of many sizes, some of them greyscale."""
    default = HERE.parents[2] / "shared" / "data"
    folder = Path(os.environ.get("KD_CACHE_DATA", default)) / "imagenet-64"
    paths = sorted(folder.glob("*/*"))
    if not paths:
        pytest.skip(f"no images under {folder}; set KD_CACHE_DATA to the folder above imagenet-64")
    return paths


@pytest.fixture(scope="session")
def make_recipe():
    def make(*ops, size=32, preset=None):
        return AugmentConfig(size=size, preset=preset, ops=ops or None).recipe()

    return make


@pytest.fixture(scope="session")
def draw():
    """draw(op, count): parameters of samples 0 to count - 1 under seed 1, from stream 0."""

    def draw_params(op, count):
        (words,) = draw_words(1, np.arange(count), [op.num_words])
        return op.draw(words)

    return draw_params


@pytest.fixture(scope="session")
def assert_uniform():
    """Chi-square against equal counts, five standard deviations wide: it fails by chance never."""

    def check(values, num_cells):
        counts = np.bincount(values, minlength=num_cells)
        assert len(counts) == num_cells
        expected = len(values) / num_cells
        chi_square = ((counts - expected) ** 2 / expected).sum()
        freedom = num_cells - 1
        assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom) + 5

    return check
