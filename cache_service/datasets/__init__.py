"""Image datasets: RGB images and labels by index, and an identity that is independent of paths.

The modules that open datasets are imported on first use, because the service validates `dataset:`
sections without Pillow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from cache_service.datasets.dataset_config import DatasetConfig

if TYPE_CHECKING:
    from cache_service.datasets.dataset import ImageDataset, Source, open_dataset, wrap_dataset

__all__ = ["DatasetConfig", "ImageDataset", "Source", "open_dataset", "wrap_dataset"]

if not TYPE_CHECKING:  # type checkers must still report names that do not exist

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.dataset"), name)
