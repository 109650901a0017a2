"""`digits`: the 1,797 handwritten 8 x 8 digits that ship inside scikit-learn. No torch, no network.

The test split is every fifth image of each digit: fixed, and balanced like the whole.
"""

from __future__ import annotations

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from cache_service.datasets.config import DatasetConfig
from cache_service.datasets.pixels import to_rgb
from cache_service.errors import DatasetError

TEST_STRIDE = 5


class DigitsSource:
    """Digits of one split, in scikit-learn's order."""

    paths = b""
    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, pixels_NHW: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self._pixels_NHW = pixels_NHW
        self.labels = labels

    def read(self, sample: int) -> PIL.Image.Image:
        """8 x 8, grey as RGB."""
        return to_rgb(self._pixels_NHW[sample])

    def describe(self, sample: int) -> str:  # noqa: ARG002 - Source's signature
        """Digits lie in no file of their own."""
        return ""


def open_digits(config: DatasetConfig) -> DigitsSource:
    """The train or test split.

    Raises:
        DatasetError: another split, a root or arguments are given, or scikit-learn is missing.
    """
    if config.split not in {"train", "test"}:
        raise DatasetError(f"dataset digits has splits train and test, not {config.split!r}.")
    if config.root is not None or config.args:
        raise DatasetError("dataset digits takes neither root nor args: it ships in scikit-learn.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError(
            "dataset digits needs scikit-learn.", hint="Run `pip install 'kd-cache[demo]'`."
        ) from error
    found = load_digits()
    labels = np.asarray(found.target, np.int64)
    same = labels[:, None] == labels[None, :]
    nth_of_its_digit = np.tril(same, -1).sum(axis=1)
    in_test = nth_of_its_digit % TEST_STRIDE == TEST_STRIDE - 1
    chosen = in_test if config.split == "test" else ~in_test
    pixels_NHW = np.rint(found.images * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
    return DigitsSource(pixels_NHW[chosen], labels[chosen])
