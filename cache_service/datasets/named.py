"""`torch/NAME` and `hfds/NAME` as in timm, and `module:factory` of the user's own."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from cache_service.datasets.config import DatasetConfig
from cache_service.datasets.mapped import MapSource
from cache_service.datasets.pixels import one_line
from cache_service.errors import DatasetError
from cache_service.plugins import load_object

STREAMS = ("hfids", "tfds", "wds")
"""timm's prefixes for datasets that cannot be read by sample number."""

TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("test", "testing", "val", "valid", "validation", "eval", "evaluation")
TWO_SPLITS = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
"""Datasets for which timm takes every split that is not the training one for the test split."""

OPEN_ERRORS = (
    OSError,  # includes failed downloads
    ImportError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AssertionError,  # timm's word for an unknown name
    EOFError,
)
"""What dataset libraries raise while opening, shown as one line. The cause stays chained."""


def open_named(config: DatasetConfig) -> MapSource:
    """A dataset of timm's catalog.

    Raises:
        DatasetError: the name, the split, the root or the download failed.
    """
    prefix, _, rest = config.name.partition("/")
    if prefix.lower() in STREAMS:
        raise DatasetError(
            f"dataset {config.name} is a stream; a recorded epoch reads samples by number.",
            hint=f"Use hfds/{rest} or module:factory.",
        )
    if prefix.lower() == "torch":
        _check_torchvision(config, rest.lower())
        # Arrays in memory: opening them again in a worker costs less than a copy through a pipe.
        return MapSource(
            _create(config),
            reopen=functools.partial(_create, config),
            pixel_range=config.pixel_range,
        )
    if importlib.util.find_spec("datasets") is None:
        raise DatasetError(
            f"dataset {config.name} needs Hugging Face datasets.",
            hint="Run `pip install datasets`.",
        )
    # Arrow files travel as paths, and opening again would ask the hub once a worker.
    return MapSource(_create(config), pixel_range=config.pixel_range)


def open_factory(config: DatasetConfig) -> MapSource:
    """A map-style dataset made by the user's function, called with `args` and, if set, `root`.

    Raises:
        ConfigError: there is no such function.
        DatasetError: the function does not take these arguments, or failed.
    """
    return MapSource(
        _call_factory(config),
        reopen=functools.partial(_call_factory, config),
        pixel_range=config.pixel_range,
    )


def factory_name(name: str) -> str:
    """The name without the folder: a dataset's identity must not depend on where a file lies."""
    module, _, function = name.rpartition(":")
    return f"{Path(module).name}:{function}"


def _check_torchvision(config: DatasetConfig, name: str) -> None:
    if config.root is None:
        raise DatasetError(f"dataset {config.name} needs `root`: the folder of its files.")
    if name in TWO_SPLITS and config.split not in (*TRAIN_SPLITS, *TEST_SPLITS):
        raise DatasetError(
            f"dataset {config.name} has splits train and test, not {config.split!r}."
        )


def _create(config: DatasetConfig) -> Any:
    from timm.data.dataset_factory import create_dataset

    try:
        # Libraries print their progress; standard output belongs to --json.
        with contextlib.redirect_stdout(sys.stderr):
            return create_dataset(
                config.name, root=config.root, split=config.split, transform=None, **config.args
            )
    except OPEN_ERRORS as error:
        raise DatasetError(
            f"dataset {config.name} ({config.split}) cannot be opened in {config.root}: "
            f"{one_line(error)}.",
            hint="To fetch it, set dataset.args.download: true."
            if config.name.lower().startswith("torch/") and not config.args.get("download")
            else "",
        ) from error


def _call_factory(config: DatasetConfig) -> Any:
    factory: Any = load_object(config.name)
    arguments = config.args | ({"root": config.root} if config.root is not None else {})
    if not callable(factory):
        raise DatasetError(f"dataset {config.name} is a {type(factory).__name__}, not a function.")
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise DatasetError(
            f"dataset {config.name} does not take {sorted(arguments)}: {error}.",
            hint=f"It takes {inspect.signature(factory)}.",
        ) from error
    try:
        return factory(**arguments)
    except OPEN_ERRORS as error:
        raise DatasetError(f"dataset {config.name} failed to open: {one_line(error)}.") from error
