"""Opens datasets: RGB images by index, labels, class names and an identity.

`open_dataset` chooses the source by the dataset's name. The identity covers the content of a
dataset and not its location: size, class names, labels, paths below the root, and the pixels of
some samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from cache_service.datasets.dataset_config import DatasetConfig
from cache_service.datasets.folder import open_folder
from cache_service.datasets.held_out import hold_out
from cache_service.datasets.hugging_face import hfds_name
from cache_service.datasets.image_file import describe_damage
from cache_service.datasets.mapped import MapSource
from cache_service.datasets.named import (
    STREAMS,
    factory_name,
    open_digits,
    open_factory,
    open_named,
)
from cache_service.datasets.path_list import PathList
from cache_service.datasets.pixels import DECODE_ERRORS, PixelRange, PixelRangeError
from cache_service.errors import ConfigError, DatasetError, UnreadableSampleError
from cache_service.format.canonical import canonical_json, sha256_hex
from cache_service.format.spec import DatasetId
from cache_service.human_format import natural_key, printable_path
from cache_service.plugins import raised_in
from cache_service.shared_arrays import share

PREFIXES = ("torch", "hfds", *STREAMS)

NUM_PROBES = 64
"""Number of samples whose pixels are part of the identity. ImageNet's take 0.5 s to decode."""

NUM_REPEATS = 8
"""Number of samples that are read twice, to detect random transforms inside a dataset. A random
flip stays undetected with probability 2**-8."""

MAX_NAMES = 5
"""Number of names that a message lists."""


def open_dataset(config: DatasetConfig, *, class_names: Sequence[str] = ()) -> ImageDataset:
    """Open a dataset by its name.

    Args:
        config: section `dataset` of a build or train file.
        class_names: class names of the training split, by label. The labels of this split are
            renumbered so that equal names have equal labels.

    Raises:
        ConfigError: a class of this split is not in `class_names`.
        DatasetError: the dataset does not exist or is not usable. The message names the files that
            were expected and their folder.
        UnreadableSampleError: a sample that is part of the identity cannot be decoded.
    """
    name, split = config.name, config.split
    source: Source
    if config.hold_out is not None:
        config = config.model_copy(update={"split": "train"})
    if name == "folder":
        source = open_folder(config, class_names=class_names)
    elif name == "digits":
        source = open_digits(config)
    elif ":" in name:
        source, name = open_factory(config), factory_name(name)
    elif name.partition("/")[0].lower() in PREFIXES:
        source, name = open_named(config), hfds_name(name)
    else:
        raise DatasetError(
            f"dataset {name!r} is unknown: expected folder, digits, torch/NAME, hfds/NAME or "
            "module:factory."
        )
    shown = f"{name} ({split})"
    if config.hold_out is not None:
        source = hold_out(source, config.hold_out, split=split, dataset=shown)
    if config.classes is not None:
        source = arrange_classes(source, config.classes, dataset=shown)
    source = match_classes(source, class_names, dataset=shown)
    return ImageDataset(source, name=name, split=split)


def wrap_dataset(
    map_style: Any,
    *,
    name: str = "custom",
    split: str = "train",
    pixel_range: PixelRange | None = None,
) -> ImageDataset:
    """Wrap a map-style dataset, in which `map_style[i]` is (image, label) and always the same.

    Images are PIL images or pixels [H, W] or [H, W, 3]. Labels are integers from 0. Pixels are
    uint8, or of another type if `pixel_range` gives the values of black and white. An ImageDataset
    is returned unchanged.

    Raises:
        DatasetError: the dataset cannot be indexed, or a label is not a class number.
        UnreadableSampleError: a sample that is part of the identity cannot be decoded.
    """
    if isinstance(map_style, ImageDataset):
        return map_style
    return ImageDataset(MapSource(map_style, pixel_range=pixel_range), name=name, split=split)


class Source(Protocol):
    """A source of samples. It is picklable, and a copy in another process opens its own files."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels [N]. Images are decoded only if the dataset does not list its labels."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty if the dataset has none."""

    @property
    def paths(self) -> PathList:
        """Paths below the root; empty if samples are not files."""

    def read(self, sample: int) -> PIL.Image.Image:
        """Decode an image to RGB. Raises one of DECODE_ERRORS if that fails."""

    def describe(self, sample: int) -> str:
        """Return the path of the sample, or "" if it is not a file."""

    # Optional: encoded(sample) -> bytes | None, the content of the image file; left_out: str.


class ImageDataset:
    """A dataset whose samples are read by index. It is small when pickled.

    Attributes:
        labels: labels [N].
        classes: class names by label; empty if there are none.
        left_out: description of files beside the samples that were not taken; may be empty.
        id: identity of the content.
    """

    def __init__(self, source: Source, *, name: str, split: str) -> None:
        self._source = source
        self._label = f"{name} ({split})"
        self.labels = source.labels
        self.labels.flags.writeable = False
        self.classes = source.classes
        self.left_out = getattr(source, "left_out", "")
        self.id = DatasetId(
            name=name,
            split=split,
            num_samples=len(self),
            num_classes=self._check_labels(),
            sha256=self._digest(),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, sample: int) -> tuple[PIL.Image.Image, int]:
        return self.image(sample), int(self.labels[sample])

    def __repr__(self) -> str:
        return f"ImageDataset({self._label}, {len(self)} samples)"

    def image(self, sample: int) -> PIL.Image.Image:
        """Decode the image of a sample to RGB.

        Raises:
            IndexError: the index is out of range.
            DatasetError: the pixels do not have 8 bits, and `pixel_range` is missing or too small;
                or a dataset of the user's own raised an error.
            UnreadableSampleError: the sample exists but cannot be decoded.
        """
        sample = int(sample)
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {self._label}, which has {len(self)} samples")
        try:
            return self._source.read(sample)
        except PixelRangeError as error:
            raise DatasetError(
                f"sample {sample} of {self._label} ({self.describe(sample)}): {error}.",
                hint="Set dataset.pixel_range (or pixel_range of wrap_dataset) to the values of "
                "black and white, such as [0, 65535] or [0, 1].",
            ) from error
        except DECODE_ERRORS as error:
            path = self.describe(sample)
            why, hint = describe_damage(Path(path), error)
            raise UnreadableSampleError(
                f"sample {sample} of {self._label} cannot be decoded: {printable_path(path)}: {why}"
                f"{raised_in(error)}.",
                hint=hint,
            ) from error
        except DatasetError as refusal:
            raise DatasetError(f"{self._label}: {refusal.message}", hint=refusal.hint) from refusal

    @cached_property
    def files_sha256(self) -> str | None:
        """The identity, but with the bytes of image files in place of the pixels decoded from them.

        Equal values under unequal identities mean that a library decodes the same files to other
        pixels. None if the dataset has no files whose bytes it can read.
        """
        encoded = getattr(self._source, "encoded", lambda _: None)
        digests = []
        for sample in self._probes:
            content = encoded(sample)
            if content is None:
                return None
            digests.append(sha256_hex(content))
        return self._sha256(files=digests)

    def describe(self, sample: int) -> str:
        """Return the path or the number of a sample, for messages."""
        return self._source.describe(sample) or f"sample {sample}"

    def _check_labels(self) -> int:
        """Return the number of classes. Raises DatasetError for labels that are not classes."""
        if not len(self):
            raise DatasetError(f"dataset {self._label} has no samples.")
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        num_classes = len(self.classes) or highest + 1
        if lowest < 0 or highest >= num_classes:
            bad = int(np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))[0])
            raise DatasetError(
                f"dataset {self._label} has {num_classes} classes, but sample {bad} "
                f"({self.describe(bad)}) has label {self.labels[bad]}; labels are 0 to "
                f"{num_classes - 1}."
            )
        if num_classes < 2:
            raise DatasetError(
                f"dataset {self._label} has one class only; there is nothing to tell apart."
            )
        return num_classes

    @property
    def _probes(self) -> list[int]:
        """The samples whose content is part of the identity, evenly spaced."""
        count = min(NUM_PROBES, len(self))
        return [i * (len(self) - 1) // max(count - 1, 1) for i in range(count)]

    def _digest(self) -> str:
        """Compute the identity from size, class names, labels, paths and pixels of samples."""
        probes = self._probes
        pixels = [_pixel_digest(self.image(sample)) for sample in probes]
        for sample, first in list(zip(probes, pixels, strict=True))[:NUM_REPEATS]:
            if _pixel_digest(self.image(sample)) != first:
                raise DatasetError(
                    f"dataset {self._label} gave two different images for sample {sample}.",
                    hint="Open it without random transforms: augmentation belongs in `augment`.",
                )
        return self._sha256(pixels=pixels)

    def _sha256(self, **content: list[str]) -> str:
        document = {
            "num_samples": len(self),
            "classes": list(self.classes) or None,
            "labels": sha256_hex(self.labels.astype("<i8", copy=False).data),
            "paths": sha256_hex(self._source.paths.joined.data) if self._source.paths else None,
            **content,
        }
        return sha256_hex(canonical_json(document))


def _pixel_digest(image: PIL.Image.Image) -> str:
    """Return the SHA-256 of size and pixels. Images of 4 x 2 and 2 x 4 may have equal bytes."""
    digest = hashlib.sha256(b"%d,%d," % image.size)
    digest.update(image.tobytes())
    return digest.hexdigest()


class RelabeledSource:
    """The samples of another source with renumbered classes."""

    def __init__(self, source: Source, classes: Sequence[str], labels: NDArray[np.int64]) -> None:
        self._source = source
        self.paths = source.paths
        self.classes = tuple(classes)
        self.labels = share(labels)
        self.left_out = getattr(source, "left_out", "")

    def read(self, sample: int) -> PIL.Image.Image:
        """Read from the original source."""
        return self._source.read(sample)

    def encoded(self, sample: int) -> bytes | None:
        """Return the content of the file of the sample, or None."""
        return getattr(self._source, "encoded", lambda _: None)(sample)

    def describe(self, sample: int) -> str:
        """Describe the sample of the original source."""
        return self._source.describe(sample)


def arrange_classes(source: Source, order: str | Sequence[str], *, dataset: str) -> Source:
    """Renumber the classes of a source by the setting `dataset.classes`.

    Args:
        source: source with class names.
        order: natural, text, numbers (drop the names), or a list of all class names.
        dataset: name of the dataset, for messages.

    Raises:
        DatasetError: the source has no class names, or the list is not a permutation of them.
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
    """Renumber the labels of a split by the class names of the training split.

    Classes that are missing in this split have no samples. If either split has no class names, the
    labels are not changed.

    Args:
        source: source of the split.
        classes: class names of the training split, by label.
        dataset: name of the dataset, for messages.

    Raises:
        ConfigError: the split has a class that the training split does not have.
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
    """List a few names for a message, and the number of names that are left out."""
    if not names:
        return "none"
    shown = ", ".join(repr(name[:40]) for name in names[:MAX_NAMES])
    return shown if len(names) <= MAX_NAMES else f"{shown} and {len(names) - MAX_NAMES} more"


def _relabel(source: Source, arranged: Sequence[str]) -> Source:
    if source.labels.min(initial=0) < 0 or source.labels.max(initial=0) >= len(source.classes):
        return source  # ImageDataset refuses such labels and names the sample
    number = {name: label for label, name in enumerate(arranged)}
    new_C = np.array([number[name] for name in source.classes], np.int64)
    return RelabeledSource(source, arranged, new_C[source.labels])
