"""The classes of the images of a flat folder, from a text file, as data sets publish them.

Three forms are read, told apart by their content:

- `FILE CLASS`, separated by spaces or a tab, in either order: `val_map.txt`, `val.txt` of Caffe.
- CSV (`,` or `;`) with a column of files and one of classes, with or without a header:
  `file,label`, and `LOC_val_solution.csv` of ImageNet, whose second column also has boxes.
- a class per line, for the images in the order of their names: `synset_labels.txt`, and the ground
  truth of ILSVRC2012, whose numbers mean classes only by a second file, `map_clsloc.txt`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cache_service.errors import DatasetError
from cache_service.human_format import describe_error

FILE_COLUMNS = ("file", "filename", "file_name", "image", "imageid", "image_id", "id", "path")
LABEL_COLUMNS = (
    *("label", "class", "class_name", "target", "category", "wnid", "synset"),
    *("class_id", "label_id", "classid", "predictionstring"),
)
BOXES = re.compile(r"(\S+)( -?\d+){4}( (\S+)( -?\d+){4})*")
"""`n03995372 85 1 499 272`, once or several times: a class and a box each."""


class LabeledImages(NamedTuple):
    """The images that a file of labels names.

    Attributes:
        paths: of images below the split's folder, in the order in which they were given.
        labels: of these images.
        classes: names by label; empty if numbers have no names.
        left_out: description of images without a label; may be empty.
    """

    paths: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    left_out: str


def label_images(
    images: Sequence[str],
    *,
    labels: Path,
    names: Path | None,
    folder: Path,
    class_names: Sequence[str] = (),
) -> LabeledImages:
    """Give each image its class.

    Args:
        images: paths below `folder`, sorted.
        labels: file of labels.
        names: file with the names of numbers, or None.
        folder: of the split, for messages.
        class_names: class names of training. Numbers without a file of names are positions in it.

    Raises:
        DatasetError: a file cannot be read, a listed image does not exist, or numbers are
            ambiguous. The message names the file and the line.
    """
    class_of = _read_labels(labels, images, folder)
    paths = [path for path in images if path in class_of]
    unlisted = [path for path in images if path not in class_of]
    left_out = (
        f"{len(unlisted):,} images that {labels} does not list, such as {folder / unlisted[0]}"
        if unlisted
        else ""
    )
    texts = [class_of[path] for path in paths]
    numbers = [int(text) for text in texts if re.fullmatch(r"\d+", text)]
    if len(numbers) == len(texts) and not {*texts} <= {*class_names}:
        if names is None:
            classes = _number_classes(labels, numbers, class_names)
            return LabeledImages(paths, numbers, classes, left_out)
        texts = _name_numbers(names, numbers)
    elif names is not None:
        raise DatasetError(
            f"dataset.label_names is set to {names}, but the classes in {labels} are no numbers, "
            f"such as {next(text for text in texts if not text.isdecimal())!r}."
        )
    classes = tuple(sorted({*texts}))
    label_of = {name: label for label, name in enumerate(classes)}
    return LabeledImages(paths, [label_of[text] for text in texts], classes, left_out)


def _number_classes(
    labels: Path, numbers: Sequence[int], class_names: Sequence[str]
) -> tuple[str, ...]:
    """The names of numbers that count the classes of training from 0; () if it has no names."""
    lowest, highest = min(numbers), max(numbers)
    if lowest > 0:
        raise DatasetError(
            f"{labels} numbers classes from {lowest} to {highest}; whether 0 or 1 is the first "
            "class, and which classes the numbers mean, is not known.",
            hint="Set dataset.label_names to a file with the name of each number, such as "
            "map_clsloc.txt for the ground truth of ILSVRC2012.",
        )
    if class_names and highest >= len(class_names):
        raise DatasetError(
            f"{labels} numbers classes up to {highest}, but training has {len(class_names)} "
            f"classes, 0 to {len(class_names) - 1}.",
            hint="Set dataset.label_names to a file with the name of each number.",
        )
    return tuple(class_names)


def _name_numbers(names: Path, numbers: Sequence[int]) -> list[str]:
    """The name of each number, by a file of names."""
    lines = _lines(names)
    rows = [line.split() for line in lines]
    if not all(re.fullmatch(r"n\d{8}|\d+", row[0]) or len(row) == 2 for row in rows):
        rows = [[line] for line in lines]  # a name may have spaces; what follows a wnid is left out
    pairs: dict[int, str] = {}
    if all(len(row) > 1 and row[1].isdecimal() and not row[0].isdecimal() for row in rows):
        pairs = {int(row[1]): row[0] for row in rows}
    elif all(len(row) > 1 and row[0].isdecimal() and not row[1].isdecimal() for row in rows):
        pairs = {int(row[0]): row[1] for row in rows}
    elif 0 in numbers or len(rows) in numbers:
        # Both cannot be: with a 0 the last name is never a number of its own.
        first = 0 if 0 in numbers else 1
        pairs = {first + number: row[0] for number, row in enumerate(rows)}
    else:
        raise DatasetError(
            f"{names} lists {len(rows)} names, and the numbers reach from {min(numbers)} to "
            f"{max(numbers)}: whether the first name is number 0 or 1 is not known.",
            hint=f"Write `NAME NUMBER` lines into {names.name}.",
        )
    unknown = sorted({*numbers} - pairs.keys())
    if len(pairs) < len(rows) or unknown:
        problem = f"no name for number {unknown[0]}" if unknown else "two names for one number"
        raise DatasetError(f"{names} has {problem}.")
    return [pairs[number] for number in numbers]


def _read_labels(file: Path, images: Sequence[str], folder: Path) -> dict[str, str]:
    """Image -> class as text."""
    lines = _lines(file)
    rows = _rows(lines)
    known = _Images(images)
    if all(len(row) == 1 for row in rows):
        if any(known.find(row[0]) for row in rows[:3]):
            raise DatasetError(f"{file} lists files, but no classes.")
        if len(rows) != len(images):
            raise DatasetError(
                f"{file} has a class per line, {len(rows):,} in all, but {folder} has "
                f"{len(images):,} images.",
                hint="Write `FILE CLASS` lines.",
            )
        return {image: row[0] for image, row in zip(images, rows, strict=True)}
    file_column, label_column, has_header = _columns(file, rows, known, folder)
    found: dict[str, str] = {}
    for number, row in enumerate(rows[has_header:], 1 + has_header):
        if max(file_column, label_column) >= len(row):
            raise DatasetError(f"{file} line {number}: expected a file and a class.")
        image = known.find(row[file_column])
        if image is None:
            raise DatasetError(
                f"{file} line {number} lists {row[file_column]!r}, which is no image in {folder}, "
                f"or several of that name; an image there is {images[0]}.",
                hint="List the images of this split only, by their paths below its folder.",
            )
        label = _first_class(row[label_column])
        if not label or found.setdefault(image, label) != label:
            problem = f"classes {found[image]!r} and {label!r}" if label else "no class"
            raise DatasetError(f"{file} line {number} has {problem} for {image}.")
    return found


def _columns(
    file: Path, rows: Sequence[Sequence[str]], known: _Images, folder: Path
) -> tuple[int, int, bool]:
    """Column of files, column of classes, and whether the first row is a header."""
    sample = rows[1] if len(rows) > 1 else rows[0]
    columns = [n for n, cell in enumerate(sample) if known.find(cell)]
    if not columns:
        columns = [n for n, cell in enumerate(rows[0]) if cell.lower() in FILE_COLUMNS]
    if not columns:
        raise DatasetError(
            f"{file} has no column of image files: its second line is {' '.join(sample)[:80]!r}, "
            f"and an image in {folder} is {known.images[0]}.",
            hint="Write `FILE CLASS` lines, or one class per line.",
        )
    file_column = columns[0]
    has_header = known.find(rows[0][file_column]) is None
    others = [n for n in range(len(sample)) if n != file_column]
    titles = [cell.strip().lower() for cell in rows[0]]
    if has_header:
        named = [n for n in others if n < len(titles) and titles[n] in LABEL_COLUMNS]
        others = named or others
    if len(others) != 1:
        shown = ", ".join(rows[0]) if has_header else f"{len(sample)} columns"
        raise DatasetError(
            f"{file} has several columns that could be the class: {shown}.",
            hint=f"Name one of them {LABEL_COLUMNS[0]!r} in a header, or keep two columns.",
        )
    label_column = others[0]
    if has_header and not {*titles} & {*FILE_COLUMNS, *LABEL_COLUMNS}:
        # The first file may be missing; then it has an extension, or its class is one of others.
        others_say = {row[label_column] for row in rows[1:] if len(row) > label_column}
        is_file = bool(Path(rows[0][file_column]).suffix)
        has_header = not is_file and rows[0][label_column] not in others_say
    return file_column, label_column, has_header


class _Images:
    """Finds images by path, by path with the split's folder, by file name, or by its stem."""

    def __init__(self, images: Sequence[str]) -> None:
        self.images = images
        self._exact = {*images}
        self._by_name: dict[str, str | None] = {}
        for image in images:
            path = Path(image)
            for name in {path.name, path.stem}:
                self._by_name[name] = None if name in self._by_name else image

    def find(self, text: str) -> str | None:
        """The image that a text names; None if there is none, or several."""
        path = text.strip().replace("\\", "/").removeprefix("./")
        if path in self._exact:
            return path
        for n in range(path.count("/")):
            below = path.split("/", n + 1)[-1]
            if below in self._exact:
                return below
        return self._by_name.get(path.rpartition("/")[2])


def _first_class(text: str) -> str:
    """The class in a cell: a text, or the class of boxes, which is the same in all of them."""
    cell = re.sub(r"^(\d+)\.0+$", r"\1", text.strip())  # as pandas writes a column with gaps
    if not BOXES.fullmatch(cell):
        return cell
    classes = {*cell.split()[::5]}
    return classes.pop() if len(classes) == 1 else ""


def _rows(lines: Sequence[str]) -> list[list[str]]:
    for separator in ",;":
        if any(separator in line for line in lines[:2]):
            rows = csv.reader(lines, delimiter=separator)
            return [[cell.strip() for cell in row] for row in rows]
    if any("\t" in line for line in lines[:2]):
        return [[cell.strip() for cell in line.split("\t")] for line in lines]
    # Either the file or, for `CLASS FILE`, the class comes first; a name may have spaces.
    return [line.rsplit(None, 1) for line in lines]


def _lines(file: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{file} cannot be read: {describe_error(error)}.",
            hint="dataset.labels and dataset.label_names are text files, relative to dataset.root.",
        ) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DatasetError(f"{file} is empty.")
    return lines
