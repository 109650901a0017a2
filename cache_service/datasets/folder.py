"""Dataset `folder`: one subfolder per class, in the order of torchvision's ImageFolder, or a flat
folder with a file of labels (`cache_service.datasets.label_file`)."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from cache_service.datasets import pixels
from cache_service.datasets.dataset_config import DatasetConfig
from cache_service.datasets.image_file import open_image
from cache_service.datasets.label_file import label_images
from cache_service.datasets.pixels import PixelRange
from cache_service.errors import DatasetError
from cache_service.human_format import describe_error, printable_path

to_rgb = functools.partial(pixels.to_rgb, owned=True)
"""Decodes an image that was opened here, so that no copy is needed."""

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),  # torchvision's
    ".jfif",  # a JPEG, as some browsers save it
)
"""File name extensions of images, in lower case."""

NOT_TAKEN = (".avif", ".gif", ".heic", ".heif", ".jp2", ".jpe", ".jxl", ".svg")
"""Extensions of images that are not read, but named if they lie beside those that are."""

MAX_KINDS = 6
"""Number of extensions that a message lists."""

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
        classes: Sequence[str],
        *,
        pixel_range: PixelRange | None = None,
        left_out: str = "",
    ) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._root = root
        self._decoding: dict[str, Any] = {} if pixel_range is None else {"pixel_range": pixel_range}
        self._ends = np.cumsum([len(path) + 1 for path in encoded], dtype=np.int64)
        self.paths = b"\0".join(encoded)
        self.labels: NDArray[np.int64] = np.array(labels, np.int64)
        self.classes = tuple(classes)
        self.left_out = left_out

    def read(self, sample: int) -> PIL.Image.Image:
        """Open and decode the file of a sample."""
        with open_image(self._path(sample)) as image:
            return to_rgb(image, **self._decoding)

    def encoded(self, sample: int) -> bytes:
        """Return the content of the file of a sample."""
        return self._path(sample).read_bytes()

    def describe(self, sample: int) -> str:
        """Return the path of the file."""
        return str(self._path(sample))

    def _path(self, sample: int) -> Path:
        start = int(self._ends[sample - 1]) if sample else 0
        return self._root / os.fsdecode(self.paths[start : int(self._ends[sample]) - 1])


def open_folder(config: DatasetConfig, *, class_names: Sequence[str] = ()) -> FolderSource:
    """Find the images of a split, without decoding them.

    Images are sorted by class name, then by folder and file name, in the order of code points; with
    a file of labels, by folder and file name. Names that start with a dot are skipped, because
    editors and file browsers create such files. Other files are counted in `left_out`.

    Args:
        config: section `dataset`.
        class_names: of the training split, by label; for labels that are numbers.

    Raises:
        DatasetError: there is no root or no class folder, a class folder has no image, a folder is
            reached twice, or the file of labels does not fit.
    """
    if config.args:
        raise DatasetError(f"dataset folder takes no args, got {sorted(config.args)}.")
    if config.root is None:
        raise DatasetError("dataset folder needs `root`: a folder with one subfolder a class.")
    root = Path(config.root).absolute()
    try:
        if config.labels is not None:
            return _open_flat(config, root, class_names)
        split = _split_folder(root, config.split)
        folders = DistinctFolders(above=split)
        classes = sorted(entry.name for entry in split.iterdir() if _is_class(entry))
        loose = [entry.name for entry in split.iterdir() if entry.is_file()]
    except OSError as error:
        _refuse(error)
    if not classes:
        _refuse_flat(split, loose)
    paths: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        images, rest = _files_below(split / name, folders)
        if not images and name in class_names and not rest:
            empty.append(name)  # a split may lack images of a class that training has
        elif not images:
            raise DatasetError(
                f"dataset folder found no image in {split / name}: looked for "
                f"{', '.join(EXTENSIONS)}{_and_found(rest)}.",
                hint="If it is not a class, move it out of the dataset folder.",
            )
        paths += [f"{name}/{path}" for path in images]
        others += [f"{name}/{path}" for path in rest]
        labels += [label] * len(images)
    beside = [name for name in loose if _is_any_image(name)]
    left_out = _describe_left_out(split, others, beside)
    if empty:
        left_out = "; ".join(filter(None, (left_out, f"no image of class {', '.join(empty)}")))
    return FolderSource(
        split, paths, labels, classes, pixel_range=config.pixel_range, left_out=left_out
    )


def _open_flat(config: DatasetConfig, root: Path, class_names: Sequence[str]) -> FolderSource:
    """The images below a split's folder, with the labels of a file."""
    assert config.labels is not None
    split = _split_folder(root, config.split, flat=True)
    images, others = _files_below(split, DistinctFolders(above=split))
    if not images:
        raise DatasetError(
            f"dataset folder found no image below {split}: looked for {', '.join(EXTENSIONS)}"
            f"{_and_found(others)}."
        )
    labeled = label_images(
        images,
        labels=root / config.labels,
        names=None if config.label_names is None else root / config.label_names,
        folder=split,
        class_names=class_names,
    )
    own = (root / config.labels, root / (config.label_names or config.labels))
    others = [path for path in others if split / path not in own]
    parts = (_describe_left_out(split, others, []), labeled.left_out)
    return FolderSource(
        split,
        labeled.paths,
        labeled.labels,
        labeled.classes,
        pixel_range=config.pixel_range,
        left_out="; ".join(filter(None, parts)),
    )


def _split_folder(root: Path, split: str, *, flat: bool = False) -> Path:
    """Return root/<split>, or the folder of a synonym, or the root if it has no split folders.

    Args:
        root: of the dataset.
        split: its name.
        flat: whether images may lie in it without class folders.
    """
    if not root.is_dir():
        what = "there is a file; unpack it if it is an archive" if root.exists() else ""
        raise DatasetError(f"dataset folder found no folder at {root}{what and f': {what}'}.")
    synonyms = next((names for names in SPLIT_SYNONYMS if split in names), (split,))
    for name in (split, *synonyms):
        if _has_classes(root / name) or (flat and (root / name).is_dir()):
            return root / name
    others = [name for names in SPLIT_SYNONYMS for name in names if _has_classes(root / name)]
    if others:  # otherwise the names of the splits would be taken for classes
        for name in (split, *synonyms):
            if (root / name).is_dir():
                _refuse_flat(root / name, [e.name for e in (root / name).iterdir() if e.is_file()])
        raise DatasetError(
            f"dataset folder found no split {split!r} in {root}, only {', '.join(others)}.",
            hint=f"Set dataset.split to one of these, or make the folder {root / split}.",
        )
    return root


def _refuse_flat(folder: Path, names: Sequence[str]) -> NoReturn:
    """Refuse a split without class folders, and name the setting for flat folders."""
    images = sum(name.lower().endswith(EXTENSIONS) for name in names)
    found = f", and found {images:,} images without a class folder" if images else ""
    raise DatasetError(
        f"dataset folder found no class folders in {folder}: looked for "
        f"{folder}/<class>/<image>{found}.",
        hint="Set dataset.labels to a file that names the class of each image, such as "
        "LOC_val_solution.csv, val_map.txt, or a CSV with file and label."
        if images
        else "Set dataset.root to the folder above the class folders, or above the splits.",
    )


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


def _files_below(folder: Path, folders: DistinctFolders) -> tuple[list[str], list[str]]:
    """Return the paths of images and of other files below a folder, with "/" as separator."""
    walk = []
    for parent, subfolders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        try:
            folders.add(parent)
        except OSError as error:
            _refuse(error)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        walk.append((parent, names))
    images: list[str] = []
    others: list[str] = []
    for parent, names in sorted(walk):
        below = Path(parent).relative_to(folder)
        for name in sorted(names):
            if not name.startswith("."):
                found = images if name.lower().endswith(EXTENSIONS) else others
                found.append((below / name).as_posix())
    return images, others


def _is_any_image(name: str) -> bool:
    return name.lower().endswith((*EXTENSIONS, *NOT_TAKEN)) and not name.startswith(".")


def _describe_left_out(folder: Path, others: Sequence[str], beside: Sequence[str]) -> str:
    """Count files that were not taken, by extension, and name one. "" if there are none."""
    parts = []
    if others:
        parts.append(f"{_count_kinds(others)}, such as {printable_path(folder / others[0])}")
    if beside:
        plural = "" if len(beside) == 1 else "s"
        parts.append(
            f"{len(beside):,} image{plural} beside the class folders, such as "
            f"{printable_path(folder / min(beside))}"
        )
    return "; ".join(parts)


def _and_found(others: Sequence[str]) -> str:
    return f", and found {_count_kinds(others)}" if others else ""


def _count_kinds(paths: Iterable[str]) -> str:
    """`3 .gif, 1 .avif, 1 without extension`."""
    kinds = Counter(Path(path).suffix.lower() or "without extension" for path in paths)
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(MAX_KINDS))


def _has_classes(folder: Path) -> bool:
    """Return whether a folder is a split. A class that is named train has no subfolders."""
    return folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _refuse(error: OSError) -> NoReturn:
    """Refuse a folder that cannot be listed. os.walk would skip it and change the dataset."""
    raise DatasetError(f"dataset folder cannot list {error.filename}: {describe_error(error)}.")
