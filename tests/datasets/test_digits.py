from __future__ import annotations

import numpy as np
import pytest

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.errors import DatasetError


def opened(split):
    return open_dataset(DatasetConfig(name="digits", split=split))


def test_the_splits_are_disjoint_and_have_every_digit():
    train, test = opened("train"), opened("test")
    assert len(train) + len(test) == 1797
    for dataset in (train, test):
        share = np.bincount(dataset.labels, minlength=10) / len(dataset)
        assert ((share > 0.09) & (share < 0.11)).all()
    assert 0.19 < len(test) / 1797 < 0.21


def test_ink_spans_black_to_white():
    pixels = np.stack([np.asarray(image) for image, _ in opened("test")])
    assert pixels.shape[1:] == (8, 8, 3)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"split": "val"}, "splits train and test, not 'val'"),
        ({"root": "data"}, "neither root nor args"),
        ({"args": {"size": 32}}, "neither root nor args"),
    ],
)
def test_what_digits_does_not_have_is_refused(settings, says):
    with pytest.raises(DatasetError, match=says):
        open_dataset(DatasetConfig(name="digits", **settings))
