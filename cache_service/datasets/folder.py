"""Dataset `folder`: one subfolder per class, in the order of torchvision's ImageFolder, or a flat
folder with a file of labels (`cache_service.datasets.label_file`)."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from cache_service.datasets import pixels
from cache_service.datasets.dataset_config import DatasetConfig
from cache_service.datasets.image_file import open_image
from cache_service.datasets.label_file import label_images
from cache_service.datasets.path_list import PathList
from cache_service.datasets.pixels import PixelRange
from cache_service.errors import DatasetError
from cache_service.human_format import describe_error, printable_path
from cache_service.shared_arrays import GrowingArray, share

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
    """Image files in root/<class>/, by index."""

    def __init__(
        self,
        root: Path,
        paths: PathList,
        labels: NDArray[np.int64],
        classes: Sequence[str],
        *,
        pixel_range: PixelRange | None = None,
        left_out: str = "",
    ) -> None:
        self._root = root
        self._decoding: dict[str, Any] = {} if pixel_range is None else {"pixel_range": pixel_range}
        self.paths = paths
        self.labels = labels
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
        return self._root / os.fsdecode(self.paths[sample])


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
    walk = _ClassWalk(split, classes, folders, may_be_empty=frozenset(class_names))
    paths = PathList(walk.paths())
    beside = [name for name in loose if _is_any_image(name)]
    left_out = _describe_left_out(split, walk.others, beside)
    if walk.empty:
        left_out = "; ".join(filter(None, (left_out, f"no image of class {', '.join(walk.empty)}")))
    return FolderSource(
        split,
        paths,
        walk.labels.finish(),
        classes,
        pixel_range=config.pixel_range,
        left_out=left_out,
    )


class _ClassWalk:
    """Walks through the folders of the classes, one after the other, in bounded memory.

    Attributes:
        labels: of the paths that were walked through.
        others: files that are not images.
        empty: classes without a file.
    """

    def __init__(
        self,
        split: Path,
        classes: Sequence[str],
        folders: DistinctFolders,
        *,
        may_be_empty: frozenset[str],
    ) -> None:
        self._split, self._classes, self._folders = split, classes, folders
        self._may_be_empty = may_be_empty
        self.labels = GrowingArray(np.int64)
        self.others = OtherFiles()
        self.empty: list[str] = []

    def paths(self) -> Iterator[str]:
        """The paths of all images below the split's folder.

        Raises:
            DatasetError: a class has no image, and training does not have it either.
        """
        for label, name in enumerate(self._classes):
            images, rest = _files_below(self._split / name, self._folders)
            if not images and name in self._may_be_empty and not rest:
                self.empty.append(name)  # a split may lack images of a class that training has
            elif not images:
                raise DatasetError(
                    f"dataset folder found no image in {self._split / name}: looked for "
                    f"{', '.join(EXTENSIONS)}{_and_found(rest)}.",
                    hint="If it is not a class, move it out of the dataset folder.",
                )
            self.labels.append(np.full(len(images), label))
            self.others.add(f"{name}/{path}" for path in rest)
            yield from (f"{name}/{path}" for path in images)


class OtherFiles:
    """Counts files that are not images, by extension.

    Attributes:
        first: path of one; "" if there is none.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self.first = ""
        self._counts: Counter[str] = Counter()
        self.add(paths)

    def add(self, paths: Iterable[str]) -> None:
        """Count some more."""
        for path in paths:
            self.first = self.first or path
            self._counts[Path(path).suffix.lower() or "without extension"] += 1

    def __str__(self) -> str:
        """`3 .gif, 1 .avif, 1 without extension`."""
        return ", ".join(f"{n:,} {kind}" for kind, n in self._counts.most_common(MAX_KINDS))


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
    parts = (_describe_left_out(split, OtherFiles(others), []), labeled.left_out)
    return FolderSource(
        split,
        PathList(labeled.paths),
        share(np.array(labeled.labels, np.int64)),
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
        below = f"{Path(parent).relative_to(folder).as_posix()}/".removeprefix("./")
        for name in sorted(names):
            if not name.startswith("."):
                found = images if name.lower().endswith(EXTENSIONS) else others
                found.append(below + name)
    return images, others


def _is_any_image(name: str) -> bool:
    return name.lower().endswith((*EXTENSIONS, *NOT_TAKEN)) and not name.startswith(".")


def _describe_left_out(folder: Path, others: OtherFiles, beside: Sequence[str]) -> str:
    """Count files that were not taken, by extension, and name one. "" if there are none."""
    parts = []
    if others.first:
        parts.append(f"{others}, such as {printable_path(folder / others.first)}")
    if beside:
        plural = "" if len(beside) == 1 else "s"
        parts.append(
            f"{len(beside):,} image{plural} beside the class folders, such as "
            f"{printable_path(folder / min(beside))}"
        )
    return "; ".join(parts)


def _and_found(others: Sequence[str]) -> str:
    return f", and found {OtherFiles(others)}" if others else ""


def _has_classes(folder: Path) -> bool:
    """Return whether a folder is a split. A class that is named train has no subfolders."""
    return folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _refuse(error: OSError) -> NoReturn:
    """Refuse a folder that cannot be listed. os.walk would skip it and change the dataset."""
    raise DatasetError(f"dataset folder cannot list {error.filename}: {describe_error(error)}.")
