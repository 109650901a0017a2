"""Hugging Face datasets as (image, label) by index: `hfds/NAME`, or a Dataset of the user's own.

Columns are found by their types, not by their names: an image, and a class label or an integer. A
column of the usual name, `image` or `label`, is preferred; several others are refused by name.
"""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from cache_service.datasets.dataset_config import DatasetConfig
from cache_service.datasets.pixels import PixelRange, to_rgb
from cache_service.errors import DatasetError
from cache_service.plugins import errors_in_one_line

IMAGE_KINDS = ("image", "bytes", "pixels")
LABEL_KINDS = ("class", "integer", "text")
"""Kinds of columns, the best first. Texts are taken as class names."""

INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
TEXTS = ("string", "large_string", "string_view")
BINARIES = ("binary", "large_binary", "binary_view")


def open_hfds(config: DatasetConfig) -> HfItems:
    """Open `hfds/NAME` through `datasets`: from the hub, a local folder, or one of `save_to_disk`.

    Of `args`, `input_key` and `target_key` name the columns of images and labels, as in timm; all
    others go to `load_dataset`.

    Raises:
        DatasetError: `datasets` is missing, the dataset or its split does not exist, or its columns
            are ambiguous.
    """
    if importlib.util.find_spec("datasets") is None:
        raise DatasetError(
            f"dataset {config.name} needs Hugging Face datasets.",
            hint="Run `pip install datasets`.",
        )
    args = dict(config.args)
    keys = {key: args.pop(key, None) for key in ("input_key", "target_key")}
    args.pop("download", None)  # an argument of timm that means nothing here
    problem = f"dataset {config.name} ({config.split}) cannot be opened"
    with errors_in_one_line(problem, DatasetError):
        dataset = _load(config.name.partition("/")[2], config, args)
    return HfItems(dataset, pixel_range=config.pixel_range, **keys)


def hfds_name(name: str) -> str:
    """The name without the folder of a local dataset, on which the identity must not depend."""
    prefix, _, rest = name.partition("/")
    is_local = prefix.lower() == "hfds" and Path(rest).is_dir()
    return f"{prefix}/{Path(rest).name}" if is_local else name


def _load(name: str, config: DatasetConfig, args: dict[str, Any]) -> Any:
    import datasets  # type: ignore[import-untyped]

    saved = Path(name)
    if (saved / "dataset_dict.json").is_file():
        splits = json.loads((saved / "dataset_dict.json").read_text())["splits"]
        if config.split not in splits:
            raise DatasetError(
                f"dataset {config.name} has splits {', '.join(splits)}, not {config.split!r}."
            )
        return datasets.load_from_disk(str(saved / config.split))
    if (saved / "state.json").is_file():
        return datasets.load_from_disk(name)
    return datasets.load_dataset(name, split=config.split, cache_dir=config.root, **args)


class HfItems:
    """A Dataset of `datasets` as (image, label) by index.

    Attributes:
        targets: labels [N].
        classes: class names by label; empty if there are none.

    Raises:
        DatasetError: there are several columns of images or labels, or none.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        input_key: str | None = None,
        target_key: str | None = None,
        pixel_range: PixelRange | None = None,
    ) -> None:
        import datasets

        if not isinstance(dataset, datasets.Dataset):
            raise DatasetError(
                f"a {type(dataset).__name__} cannot be read by sample number.",
                hint="Use one split, without streaming.",
            )
        features = dataset.features
        self._image_key = _choose(features, input_key, "image", "input_key", IMAGE_KINDS)
        label_key = _choose(features, target_key, "label", "target_key", LABEL_KINDS)
        kind = _kind(features[self._image_key])
        # Arrays are stored as lists of lists, which do not tell the type of a pixel.
        self._dtype = features[self._image_key].dtype if kind == "pixels" else None
        if kind == "image":
            dataset = dataset.cast_column(self._image_key, datasets.Image(decode=False))
        self._pixel_range = pixel_range
        self.targets, self.classes = _labels(dataset, label_key)
        self._dataset = dataset.select_columns([self._image_key]).with_format(None)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, sample: int) -> tuple[PIL.Image.Image, int]:
        value = self._value(sample)
        label = int(self.targets[sample])
        if isinstance(value, bytes):
            with PIL.Image.open(io.BytesIO(value)) as image:
                return to_rgb(image, self._pixel_range, owned=True), label
        return to_rgb(np.asarray(value, self._dtype), self._pixel_range), label

    def encoded(self, sample: int) -> bytes | None:
        """Return the content of an image file, or None if the column has arrays."""
        value = self._value(sample)
        return value if isinstance(value, bytes) else None

    def _value(self, sample: int) -> Any:
        """The bytes of a file, or nested lists of pixels."""
        value = self._dataset[sample][self._image_key]
        if isinstance(value, dict):
            path, value = value.get("path"), value.get("bytes")
            value = Path(path).read_bytes() if value is None and path else value
        if value is None:
            raise ValueError(f"column {self._image_key} is empty")
        return value


def _choose(
    features: Any, named: str | None, usual: str, setting: str, kinds: tuple[str, ...]
) -> str:
    """The column of images or of labels."""
    columns = {column: _kind(feature) for column, feature in features.items()}
    shown = ", ".join(f"{column} ({_type_name(features[column])})" for column in columns)
    if named is not None:
        if columns.get(named) not in kinds:
            what = "has no column" if named not in columns else "has no such values in column"
            raise DatasetError(
                f"dataset.args.{setting} names {named!r}, but the dataset {what} {named!r}: its "
                f"columns are {shown}."
            )
        return named
    for kind in kinds:
        found = [column for column, its in columns.items() if its == kind]
        if usual in found or len(found) == 1:
            return usual if usual in found else found[0]
        if len(found) > 1:
            break
    raise DatasetError(
        f"no column of {usual}s can be chosen by its type; the columns are {shown}.",
        hint=f"Set dataset.args.{setting} to one of them.",
    )


def _kind(feature: Any) -> str:
    """What a column may be: one of IMAGE_KINDS or LABEL_KINDS, or ""."""
    import datasets

    if isinstance(feature, datasets.Image) or (
        isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    ):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return "class"
    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return "pixels"
    kind = getattr(feature, "dtype", "") if isinstance(feature, datasets.Value) else ""
    groups = {"bytes": BINARIES, "integer": INTEGERS, "text": TEXTS}
    return next((name for name, dtypes in groups.items() if kind in dtypes), "")


def _type_name(feature: Any) -> str:
    dtype = getattr(feature, "dtype", None)
    return str(dtype) if type(feature).__name__ == "Value" else type(feature).__name__


def _labels(
    dataset: Any, column: str
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], tuple[str, ...]]:
    """Labels [N] of a column, and the names of the classes; texts are sorted."""
    values = dataset.select_columns([column]).with_format(None)[:][column]
    if None in values:
        raise DatasetError(f"sample {values.index(None)} has no value in column {column}.")
    if _kind(dataset.features[column]) == "text":
        names = sorted(set(values))
        number = {name: label for label, name in enumerate(names)}
        return np.array([number[value] for value in values], np.int64), tuple(names)
    return np.array(values, np.int64), tuple(getattr(dataset.features[column], "names", None) or ())
