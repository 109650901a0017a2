"""The numbers of a dataset's classes: set by a setting, or matched to those of another split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from cache_service.datasets.images import Source
from cache_service.errors import ConfigError, DatasetError
from cache_service.human_format import natural_key

MAX_NAMES = 5
"""Names that a message shows."""


class RelabeledSource:
    """The samples of another source under other class numbers."""

    def __init__(self, source: Source, classes: Sequence[str], labels: NDArray[np.int64]) -> None:
        self._source = source
        self.paths = source.paths
        self.classes = tuple(classes)
        self.labels = labels

    def read(self, sample: int) -> PIL.Image.Image:
        """As the source."""
        return self._source.read(sample)

    def describe(self, sample: int) -> str:
        """As the source."""
        return self._source.describe(sample)


def arrange_classes(source: Source, order: str | Sequence[str], *, dataset: str) -> Source:
    """Renumber the classes of a source as `dataset.classes` says.

    Args:
        source: with class names.
        order: natural, text, numbers (drop the names), or every class name in its new place.
        dataset: for messages.

    Raises:
        DatasetError: the source has no class names, or the list does not name each once.
    """
    names = source.classes
    if order == "numbers":
        return RelabeledSource(source, (), source.labels)
    if not names:
        raise DatasetError(
            f"dataset.classes={order!r} was given, but dataset {dataset} has no class names.",
            hint="Renumber its labels where they are made.",
        )
    if len(set(names)) < len(names):
        raise DatasetError(
            f"dataset.classes={order!r} was given, but in dataset {dataset} several classes have "
            f"one name: {show_names(sorted({name for name in names if names.count(name) > 1}))}.",
        )
    if order == "natural":
        arranged = sorted(names, key=natural_key)
    elif order == "text":
        arranged = sorted(names)
    else:
        arranged = list(order)
    known, listed = set(names), set(arranged)
    missing = [name for name in names if name not in listed]
    unknown = [name for name in arranged if name not in known]
    if missing or unknown or len(arranged) != len(names):
        raise DatasetError(
            f"dataset.classes must name each of the {len(names)} classes of dataset {dataset} "
            f"once: left out: {show_names(missing)}; not a class there: {show_names(unknown)}."
        )
    return _relabel(source, arranged)


def match_classes(source: Source, classes: Sequence[str], *, dataset: str) -> Source:
    """Give the samples of another split the labels that their class names have in the first.

    Classes that this split lacks are left without samples. Where either has no names, labels are
    compared by number alone, and nothing changes.

    Args:
        source: of the other split.
        classes: names by label of the first one.
        dataset: for messages.

    Raises:
        ConfigError: the split has a class that the first does not have.
    """
    names = source.classes
    if not classes or not names or tuple(classes) == names:
        return source
    here, there = set(names), set(classes)
    unknown = [name for name in names if name not in there]
    is_ambiguous = len(there) < len(classes) or len(here) < len(names)
    if unknown or is_ambiguous:
        lacking = [name for name in classes if name not in here]
        raise ConfigError(
            f"the classes of dataset {dataset} are not those of training: "
            f"{show_names(unknown or names)} of {len(names)} classes here, where training has "
            f"{show_names(lacking or classes)} of {len(classes)}.",
            hint="Name its classes as in training; if they are the same classes under other names "
            "and in the same order, set classes: numbers for that dataset.",
        )
    return _relabel(source, classes)


def show_names(names: Sequence[str]) -> str:
    """A few names for a message, and how many more there are."""
    if not names:
        return "none"
    shown = ", ".join(repr(name[:40]) for name in names[:MAX_NAMES])
    return shown if len(names) <= MAX_NAMES else f"{shown} and {len(names) - MAX_NAMES} more"


def _relabel(source: Source, arranged: Sequence[str]) -> Source:
    if source.labels.min(initial=0) < 0 or source.labels.max(initial=0) >= len(source.classes):
        return source  # ImageDataset refuses such labels, with the sample
    number = {name: label for label, name in enumerate(arranged)}
    new_C = np.array([number[name] for name in source.classes], np.int64)
    return RelabeledSource(source, arranged, new_C[source.labels])
