"""Map-style datasets of (image, label) as sources: those of torchvision, timm and users.

Labels are read from the usual attributes of datasets, so that no image has to be decoded. Each time
an image is read, its label is compared with the listed one, so wrong attributes are detected. This
module does not import torch.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import PIL.Image
import PIL.ImageFile
from numpy.typing import NDArray

from cache_service.datasets.folder import DistinctFolders
from cache_service.datasets.hugging_face import HfItems
from cache_service.datasets.image_file import open_image
from cache_service.datasets.path_list import PathList
from cache_service.datasets.pixels import DECODE_ERRORS, PixelRange, to_rgb
from cache_service.errors import DatasetError
from cache_service.plugins import errors_in_one_line
from cache_service.shared_arrays import share

LABEL_ATTRIBUTES = ("targets", "labels", "_labels")
"""Attributes with labels in the datasets of torchvision."""

NUM_SEEN = 2
"""Images that a process compares after it has opened the dataset again."""

IMAGE_FOLDER = "torchvision.datasets.folder.ImageFolder"
"""A class whose loader converts images to RGB, which clips pixels of more than 8 bits."""


class MapSource:
    """A map-style dataset as a source.

    With `reopen`, another process opens the dataset again instead of receiving a copy, and compares
    a few images. CIFAR takes
    150 MB in memory, and classes from a file that was given by path cannot be pickled.
    """

    def __init__(
        self,
        items: Any,
        *,
        reopen: Callable[[], Any] | None = None,
        pixel_range: PixelRange | None = None,
    ) -> None:
        self._pixel_range = pixel_range
        self._reopen = reopen
        self._seen: dict[int, int] = {}
        with errors_in_one_line("the dataset cannot be listed", DatasetError):
            self._items: Any = _items_of(items, pixel_range)
            _refuse_repeated_folders(self._items)
            self.labels = share(_find_labels(self._items))
            self.classes = _find_classes(self._items)
            self.paths = _find_paths(self._items)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"_items": None} if self._reopen is not None else {})

    def read(self, sample: int) -> PIL.Image.Image:
        """Read the image of `items[sample]` and compare its label with the listed one."""
        image, label = _item(self._open(), sample)
        if label != self.labels[sample]:
            raise DatasetError(
                f"the dataset lists label {self.labels[sample]} for sample {sample}, but reading "
                f"that sample gives label {label}."
            )
        opened_here = isinstance(self._items, _TimmItems | _FolderItems)
        rgb = to_rgb(image, self._pixel_range, owned=opened_here)
        if self._reopen is not None and len(self._seen) < NUM_SEEN:
            self._seen.setdefault(sample, crc32(rgb.tobytes()))
        return rgb

    def describe(self, sample: int) -> str:
        """Return the path that the dataset lists for the sample."""
        samples = _listed_samples(self._open())
        return str(samples[sample][0]) if samples else ""

    def encoded(self, sample: int) -> bytes | None:
        """Return the content of the file that the library decodes, or None if there is none."""
        return _encoded(self._open(), sample)

    def _open(self) -> Any:
        if self._items is None:
            assert self._reopen is not None
            with errors_in_one_line("the dataset cannot be opened again", DatasetError):
                items = _items_of(self._reopen(), self._pixel_range)
            if len(items) != len(self.labels):
                raise DatasetError(
                    f"the dataset had {len(self.labels)} samples when it was opened, and has "
                    f"{len(items)} now."
                )
            self._items = items
            for sample, seen in self._seen.items():
                if crc32(self.read(sample).tobytes()) != seen:
                    raise DatasetError(
                        f"opened again in another process, the dataset gives another image for "
                        f"sample {sample}.",
                        hint="Make random choices in its factory from a fixed seed; augmentation "
                        "belongs in `augment`.",
                    )
        return self._items


class _TimmItems:
    """A timm dataset without retries. For a damaged file timm would return the *next* sample."""

    def __init__(self, dataset: Any, pixel_range: PixelRange | None) -> None:
        self._pixel_range = pixel_range
        if dataset.transform is not None or dataset.target_transform is not None:
            raise DatasetError("open timm's dataset without transforms: they belong in `augment`.")
        self._reader = dataset.reader
        self.reader_root = getattr(self._reader, "root", "")
        if hasattr(self._reader, "iter_targets"):
            self.targets = list(self._reader.iter_targets())
        else:
            self.targets = [target for _, target in self._reader.samples]
            self.samples = [
                (name, target)
                for name, target in zip(self._reader.filenames(), self.targets, strict=True)
            ]
        self.class_to_idx = getattr(self._reader, "class_to_idx", None)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, sample: int) -> tuple[PIL.Image.Image, Any]:
        file, target, *_ = self._reader[sample]
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False  # see open_image
        with file, PIL.Image.open(file) as image:
            return to_rgb(image, self._pixel_range, owned=True), target


class _FolderItems:
    """torchvision's ImageFolder without its loader, which clips pixels of more than 8 bits."""

    def __init__(self, folder: Any, pixel_range: PixelRange | None) -> None:
        self._pixel_range = pixel_range
        self.samples, self.targets = folder.samples, folder.targets
        self.classes, self.root = folder.classes, folder.root
        self.target_transform = folder.target_transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, sample: int) -> tuple[PIL.Image.Image, Any]:
        path, target = self.samples[sample]
        if self.target_transform is not None:
            target = self.target_transform(target)
        with open_image(Path(path)) as image:
            return to_rgb(image, self._pixel_range, owned=True), target


class _SubsetItems:
    """torch's Subset, whose dataset is read in the same way as without it."""

    def __init__(self, subset: Any, pixel_range: PixelRange | None) -> None:
        self.dataset = _items_of(subset.dataset, pixel_range)
        self.indices = subset.indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, sample: int) -> Any:
        return self.dataset[self.indices[sample]]


def _items_of(items: Any, pixel_range: PixelRange | None) -> Any:
    """Return the dataset, or a wrapper if its library would change images without a message."""
    kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(items).__mro__]
    if "timm.data.dataset.ImageDataset" in kinds:
        return _TimmItems(items, pixel_range)
    loader = getattr(getattr(items, "loader", None), "__module__", "")
    if kinds[0] == IMAGE_FOLDER and items.transform is None and IMAGE_FOLDER.startswith(loader):
        return _FolderItems(items, pixel_range)
    if kinds[0] == "torch.utils.data.dataset.Subset":
        return _SubsetItems(items, pixel_range)
    if "datasets.arrow_dataset.Dataset" in kinds:
        return HfItems(items, pixel_range=pixel_range)
    is_stream = any(kind.endswith(".IterableDataset") for kind in kinds)
    if is_stream or not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        raise DatasetError(
            f"{type(items).__name__} cannot be read by sample number: expected an object with "
            "__len__ and __getitem__ that gives (image, label)."
        )
    return items


def _item(items: Any, sample: int) -> tuple[Any, int]:
    """Image and label of a sample. What a user's dataset raises is one line with its place.

    Errors of image libraries are left as they are: the caller names the file.
    """
    try:
        item = items[sample]
    except DECODE_ERRORS:
        raise
    except (Exception, SystemExit):
        with errors_in_one_line(f"reading sample {sample} failed", DatasetError):
            raise
    if not isinstance(item, tuple | list) or len(item) < 2:
        keys = f" with keys {', '.join(map(str, item))}" if isinstance(item, dict) else ""
        raise DatasetError(
            f"the dataset gives items of type {type(item).__name__}{keys}: expected (image, label)."
        )
    return item[0], _label(item[1])


def _label(value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise DatasetError(
            f"the dataset gives {type(value).__name__} {str(value)[:40]!r} for a label: expected "
            "an integer."
        ) from error


def _find_labels(items: Any) -> NDArray[np.int64]:
    """Return the labels [N] that the dataset lists. Without a list, read every item once."""
    listed = _listed_labels(items)
    if listed is None:
        with errors_in_one_line("reading the labels of every sample failed", DatasetError):
            labels = [_item(items, sample)[1] for sample in range(len(items))]
        return np.array(labels, np.int64)
    transform = getattr(items, "target_transform", None)
    if transform is not None:
        with errors_in_one_line("the dataset's target_transform failed", DatasetError):
            return np.array([_label(transform(label)) for label in listed.tolist()], np.int64)
    return listed


def _listed_labels(items: Any) -> NDArray[np.int64] | None:
    if _is_subset(items):
        return _find_labels(items.dataset)[np.asarray(items.indices, np.int64)]
    for name in LABEL_ATTRIBUTES:
        labels = _as_labels(getattr(items, name, None), len(items))
        if labels is not None:
            return labels
    return _as_labels([label for _, label in _listed_samples(items)], len(items))


def _as_labels(values: Any, count: int) -> NDArray[np.int64] | None:
    """Convert to integers [count]. Returns None for class names or several targets per sample."""
    if values is None or callable(values):
        return None
    try:
        labels = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        return None
    return labels.astype(np.int64)


def _find_classes(items: Any) -> tuple[str, ...]:
    """Return class names by label, from `classes` or a one-to-one `class_to_idx`."""
    if _is_subset(items):
        return _find_classes(items.dataset)
    names = getattr(items, "classes", None)
    numbers = getattr(items, "class_to_idx", None)
    classes: tuple[str, ...] = ()
    if isinstance(names, Sequence) and not isinstance(names, str) and len(names):
        classes = tuple(name if isinstance(name, str) else ", ".join(name) for name in names)
    elif isinstance(numbers, dict) and sorted(numbers.values()) == list(range(len(numbers))):
        classes = tuple(str(name) for name, _ in sorted(numbers.items(), key=lambda item: item[1]))
    transform = getattr(items, "target_transform", None)
    return classes if transform is None else _renumbered(classes, transform)


def _renumbered(classes: tuple[str, ...], transform: Callable[[int], Any]) -> tuple[str, ...]:
    """Renumber class names by a target transform. Return () if it merges or drops classes."""
    try:
        names = {_label(transform(label)): name for label, name in enumerate(classes)}
    except (DatasetError, LookupError, ValueError):
        return ()
    is_order = sorted(names) == list(range(len(classes)))
    return tuple(names[label] for label in range(len(classes))) if is_order else ()


def _encoded(items: Any, sample: int) -> bytes | None:
    if isinstance(items, _SubsetItems):
        return _encoded(items.dataset, int(items.indices[sample]))
    if isinstance(items, HfItems):
        return items.encoded(sample)
    if isinstance(items, _FolderItems):
        return Path(items.samples[sample][0]).read_bytes()
    return None


def _refuse_repeated_folders(items: Any) -> None:
    if _is_subset(items):
        _refuse_repeated_folders(items.dataset)
    paths = [str(path) for path, _ in _listed_samples(items)]
    above = Path(getattr(items, "root", None) or getattr(items, "reader_root", None) or "")
    folders = DistinctFolders()
    for folder in sorted({path.rpartition(os.sep)[0] for path in paths}):
        if (
            above / folder
        ).is_dir():  # some datasets list paths relative to a root that is unknown here
            folders.add(above / folder)


def _find_paths(items: Any) -> PathList:
    """Return the paths that an image folder lists, relative to its root."""
    samples = _listed_samples(items)
    if not samples or not isinstance(samples[0][0], str | os.PathLike):
        return PathList()
    root = getattr(items, "root", None)
    paths = (os.fspath(path) for path, _ in samples)
    if root is not None:
        paths = (os.path.relpath(path, root) for path in paths)
    return PathList(path.replace(os.sep, "/") for path in paths)


def _is_subset(items: Any) -> bool:
    return hasattr(items, "dataset") and hasattr(items, "indices")


def _listed_samples(items: Any) -> list[tuple[Any, Any]]:
    """Return `samples` of an image folder, pairs of path and label, or [] without such a list."""
    samples: Any = getattr(items, "samples", None)
    if not isinstance(samples, list) or len(samples) != len(items) or not samples:
        return []
    return samples if isinstance(samples[0], tuple) and len(samples[0]) == 2 else []
