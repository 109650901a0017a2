"""Name -> dataset: the one place that knows which prefix means which opener."""

from __future__ import annotations

from typing import Any

from cache_service.datasets.config import DatasetConfig
from cache_service.datasets.digits import open_digits
from cache_service.datasets.folder import open_folder
from cache_service.datasets.images import ImageDataset, Source
from cache_service.datasets.mapped import MapSource
from cache_service.datasets.named import STREAMS, factory_name, open_factory, open_named
from cache_service.errors import DatasetError

PREFIXES = ("torch", "hfds", *STREAMS)


def open_dataset(config: DatasetConfig) -> ImageDataset:
    """Open a dataset by its name.

    Raises:
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
    return ImageDataset(source, name=name, split=config.split)


def wrap_dataset(map_style: Any, *, name: str = "custom", split: str = "train") -> ImageDataset:
    """A dataset of your own: `map_style[i]` is (image, label), and the same at every call.

    Images are PIL images or uint8 pixels [H, W] or [H, W, 3]; labels are integers from 0. An
    ImageDataset is returned as it is.

    Raises:
        DatasetError: it cannot be read by number, or its labels are no class numbers.
        UnreadableSampleError: one of the samples that identify it cannot be decoded.
    """
    if isinstance(map_style, ImageDataset):
        return map_style
    return ImageDataset(MapSource(map_style), name=name, split=split)
