"""Dataset `folder`: one subfolder per class, in the order of torchvision's ImageFolder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from cache_service.datasets.dataset_config import DatasetConfig
from cache_service.datasets.image_file import read_image
from cache_service.datasets.pixels import PixelRange
from cache_service.errors import DatasetError
from cache_service.human_format import describe_error

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""File name extensions of images, the same list as in torchvision's ImageFolder."""

SPLIT_SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("train", "training"),
    ("val", "valid", "validation", "eval"),
    ("test",),
)
"""Equivalent names of split folders, as in timm."""


class FolderSource:
    """Image files in root/<class>/, by index.

    The paths are stored in one bytes object with offsets instead of a list. The 1.28 million paths
    of ImageNet then take 50 MB, and are copied at once when they are sent to a loader process.
    """

    def __init__(
        self,
        root: Path,
        paths: list[str],
        labels: list[int],
        classes: list[str],
        *,
        pixel_range: PixelRange | None = None,
    ) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._root = root
        self._pixel_range = pixel_range
        self._ends = np.cumsum([len(path) + 1 for path in encoded], dtype=np.int64)
        self.paths = b"\0".join(encoded)
        self.labels: NDArray[np.int64] = np.array(labels, np.int64)
        self.classes = tuple(classes)

    def read(self, sample: int) -> PIL.Image.Image:
        """Open and decode the file of a sample."""
        return read_image(self._path(sample), self._pixel_range)

    def describe(self, sample: int) -> str:
        """Return the path of the file."""
        return str(self._path(sample))

    def _path(self, sample: int) -> Path:
        start = int(self._ends[sample - 1]) if sample else 0
        return self._root / os.fsdecode(self.paths[start : int(self._ends[sample]) - 1])


def open_folder(config: DatasetConfig) -> FolderSource:
    """Find the images of a split, without decoding them.

    Images are sorted by class name, then by folder and file name, in the order of code points.
    Names that start with a dot are skipped, because editors and file browsers create such files.

    Raises:
        DatasetError: there is no root or no class folder, a class folder has no image, or a folder
            is reached twice.
    """
    if config.args:
        raise DatasetError(f"dataset folder takes no args, got {sorted(config.args)}.")
    if config.root is None:
        raise DatasetError("dataset folder needs `root`: a folder with one subfolder a class.")
    try:
        root = _split_folder(Path(config.root).absolute(), config.split)
        folders = DistinctFolders(above=root)
        classes = sorted(entry.name for entry in root.iterdir() if _is_class(entry))
    except OSError as error:
        _refuse(error)
    if not classes:
        raise DatasetError(
            f"dataset folder found no class folders in {root}: looked for {root}/<class>/<image>."
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = _images_below(root / name, folders)
        if not images:
            raise DatasetError(
                f"dataset folder found no image in {root / name}: looked for "
                f"{', '.join(EXTENSIONS)}.",
                hint="If it is not a class, move it out of the dataset folder.",
            )
        paths += [f"{name}/{path}" for path in images]
        labels += [label] * len(images)
    return FolderSource(root, paths, labels, classes, pixel_range=config.pixel_range)


def _split_folder(root: Path, split: str) -> Path:
    """Return root/<split>, or the folder of a synonym, or the root if it has no split folders."""
    if not root.is_dir():
        raise DatasetError(f"dataset folder found no folder at {root}.")
    synonyms = next((names for names in SPLIT_SYNONYMS if split in names), (split,))
    for name in (split, *synonyms):
        if _has_classes(root / name):
            return root / name
    others = [name for names in SPLIT_SYNONYMS for name in names if _has_classes(root / name)]
    if others:  # otherwise the names of the splits would be taken for classes
        raise DatasetError(
            f"dataset folder found no split {split!r} in {root}, only {', '.join(others)}.",
            hint=f"Set dataset.split to {others[0]}.",
        )
    return root


class DistinctFolders:
    """Refuses a folder that is reached twice, through a link or a second mount.

    A link to its own parent folder would duplicate images, a link to a folder above would add
    images of other classes, and a link from one class to another would give images two labels.
    """

    def __init__(self, *, above: Path | None = None) -> None:
        self._paths: dict[tuple[int, int], str] = {}
        # Refuse links to folders above the dataset before walking through the whole disk.
        for folder in [] if above is None else [above, *above.resolve().parents]:
            self._paths.setdefault(_identity(folder), str(folder))

    def add(self, folder: str | Path) -> None:
        """Add a folder.

        Raises:
            DatasetError: the folder was added by another path, or contains the dataset.
            OSError: the folder cannot be read.
        """
        first = self._paths.setdefault(_identity(folder), str(folder))
        if first != str(folder):
            raise DatasetError(
                f"{folder} is the same folder as {first}: its images would be counted twice.",
                hint="Move the link out of the dataset folder.",
            )


def _identity(folder: str | Path) -> tuple[int, int]:
    status = Path(folder).stat()
    return status.st_dev, status.st_ino


def _images_below(folder: Path, folders: DistinctFolders) -> list[str]:
    """Return the paths of the images below a class folder, with "/" as separator."""
    walk = []
    for parent, subfolders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        try:
            folders.add(parent)
        except OSError as error:
            _refuse(error)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        walk.append((parent, names))
    images: list[str] = []
    for parent, names in sorted(walk):
        below = Path(parent).relative_to(folder)
        images += [
            (below / name).as_posix()
            for name in sorted(names)
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return images


def _has_classes(folder: Path) -> bool:
    """Return whether a folder is a split. A class that is named train has no subfolders."""
    return folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _refuse(error: OSError) -> NoReturn:
    """Refuse a folder that cannot be listed. os.walk would skip it and change the dataset."""
    raise DatasetError(f"dataset folder cannot list {error.filename}: {describe_error(error)}.")
