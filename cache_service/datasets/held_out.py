"""`dataset.hold_out`: a fraction of each class of the training split as a split of its own.

Which samples are held out depends on their paths only: the same ones on every machine, and mostly
the same ones after images were added.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from cache_service.datasets.path_list import PathList
from cache_service.errors import DatasetError
from cache_service.shared_arrays import share

if TYPE_CHECKING:  # that module imports this one
    from cache_service.datasets.dataset import Source

TRAIN_SPLITS = ("train", "training")
"""Splits that consist of what is not held out; any other split is what is held out."""


class SubsetSource:
    """Some samples of another source, under numbers of their own. All classes keep their labels.

    Attributes:
        left_out: of the whole source; see `ImageDataset`.
    """

    def __init__(self, source: Source, samples_M: NDArray[np.int64]) -> None:
        self._source = source
        self._samples_M = samples_M
        self.labels = share(source.labels[samples_M])
        self.classes = source.classes
        self.left_out = getattr(source, "left_out", "")
        self.paths = source.paths.select(samples_M.tolist())

    def read(self, sample: int) -> PIL.Image.Image:
        """Read from the original source."""
        return self._source.read(int(self._samples_M[sample]))

    def describe(self, sample: int) -> str:
        """Describe the sample of the original source."""
        return self._source.describe(int(self._samples_M[sample]))


def hold_out(source: Source, fraction: float, *, split: str, dataset: str) -> SubsetSource:
    """The samples of a split, where a fraction of each class is held out.

    The held-out samples of a class are those whose paths, or numbers in a dataset without paths,
    have the smallest SHA-256. There is at least one of a class with two samples or more.

    Args:
        source: the whole training split.
        fraction: of the samples of each class, between 0 and 1.
        split: train or training for the rest; any other name for the held-out samples.
        dataset: name of the dataset, for messages.

    Raises:
        DatasetError: every class has one sample only.
    """
    is_held_N = np.zeros(len(source.labels), bool)
    for label in np.unique(source.labels):
        members = np.flatnonzero(source.labels == label).tolist()
        count = max(1, round(fraction * len(members))) if len(members) > 1 else 0
        ordered = sorted(members, key=lambda sample: _digest(source.paths, sample))
        is_held_N[ordered[: min(count, len(members) - 1)]] = True
    if not is_held_N.any():
        raise DatasetError(
            f"dataset.hold_out={fraction:g} holds out no image of dataset {dataset}: every class "
            "has one image only.",
            hint="Put images for evaluation into a folder of their own beside that of training.",
        )
    chosen_N = ~is_held_N if split in TRAIN_SPLITS else is_held_N
    return SubsetSource(source, np.flatnonzero(chosen_N).astype(np.int64))


def _digest(paths: PathList, sample: int) -> bytes:
    return hashlib.sha256(paths[sample] if paths else b"%d" % sample).digest()
