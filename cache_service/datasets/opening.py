"""Name -> dataset: the one place that knows which prefix means which opener."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cache_service.datasets.classes import arrange_classes, match_classes
from cache_service.datasets.config import DatasetConfig
from cache_service.datasets.digits import open_digits
from cache_service.datasets.folder import open_folder
from cache_service.datasets.images import ImageDataset, Source
from cache_service.datasets.mapped import MapSource
from cache_service.datasets.named import STREAMS, factory_name, open_factory, open_named
from cache_service.datasets.pixels import PixelRange
from cache_service.errors import DatasetError

PREFIXES = ("torch", "hfds", *STREAMS)


def open_dataset(config: DatasetConfig, *, class_names: Sequence[str] = ()) -> ImageDataset:
    """Open a dataset by its name.

    Args:
        config: `dataset:` of a build or train file.
        class_names: of the split that was trained on, by label. Samples of this one get the labels
            that their class names have there.

    Raises:
        ConfigError: a class of this split is not in `class_names`.
        DatasetError: there is no such dataset, or it is not usable; the message says what was
            looked for and where.
        UnreadableSampleError: one of the samples that identify it cannot be decoded.
    """
    name = config.name
    source: Source
    if name == "folder":
        source = open_folder(config)
    elif name == "digits":
        source = open_digits(config)
    elif ":" in name:
        source, name = open_factory(config), factory_name(name)
    elif name.partition("/")[0].lower() in PREFIXES:
        source = open_named(config)
    else:
        raise DatasetError(
            f"dataset {name!r} is not known: wanted folder, digits, torch/NAME, hfds/NAME or "
            "module:factory."
        )
    shown = f"{name} ({config.split})"
    if config.classes is not None:
        source = arrange_classes(source, config.classes, dataset=shown)
    source = match_classes(source, class_names, dataset=shown)
    return ImageDataset(source, name=name, split=config.split)


def wrap_dataset(
    map_style: Any,
    *,
    name: str = "custom",
    split: str = "train",
    pixel_range: PixelRange | None = None,
) -> ImageDataset:
    """A dataset of your own: `map_style[i]` is (image, label), and the same at every call.

    Images are PIL images or pixels [H, W] or [H, W, 3]; labels are integers from 0. Pixels are
    uint8, or of another type with `pixel_range`, the values of black and white. An ImageDataset is
    returned as it is.

    Raises:
        DatasetError: it cannot be read by number, or its labels are no class numbers.
        UnreadableSampleError: one of the samples that identify it cannot be decoded.
    """
    if isinstance(map_style, ImageDataset):
        return map_style
    return ImageDataset(MapSource(map_style, pixel_range=pixel_range), name=name, split=split)
