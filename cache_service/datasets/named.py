"""Opens datasets by name: scikit-learn's digits, timm's torch/NAME and hfds/NAME, and factories."""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from cache_service.datasets.dataset_config import DatasetConfig
from cache_service.datasets.hugging_face import open_hfds
from cache_service.datasets.mapped import MapSource
from cache_service.datasets.path_list import PathList
from cache_service.datasets.pixels import to_rgb
from cache_service.errors import DatasetError
from cache_service.human_format import describe_error
from cache_service.plugins import call_factory

TEST_STRIDE = 5
"""Every fifth image of each digit is in the test split, so both splits have balanced classes."""


STREAMS = ("hfids", "tfds", "wds")
"""timm's prefixes for datasets that cannot be read by sample number."""

TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("test", "testing", "val", "valid", "validation", "eval", "evaluation")
TWO_SPLITS = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
"""Datasets for which timm treats every split except the training split as the test split."""

TIMM_ARGUMENTS = ("additional_features", "class_map", "target_format")
"""Arguments of timm's own reader of Hugging Face datasets."""

OPEN_ERRORS = (
    OSError,  # includes failed downloads
    ImportError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AssertionError,  # raised by timm for an unknown name
    EOFError,
)
"""Exceptions of dataset libraries while opening. They are reported in one line and chained."""


def open_named(config: DatasetConfig) -> MapSource:
    """Open a dataset through timm.

    Raises:
        DatasetError: the name, split or root is not valid, or the download failed.
    """
    prefix, _, rest = config.name.partition("/")
    if prefix.lower() in STREAMS:
        raise DatasetError(
            f"dataset {config.name} is a stream; a recorded epoch reads samples by number.",
            hint=f"Use hfds/{rest} or module:factory.",
        )
    if prefix.lower() == "torch":
        _check_torchvision(config, rest.lower())
        # The arrays are in memory. Opening them in a worker is faster than a copy through a pipe.
        return MapSource(
            _create(config),
            reopen=functools.partial(_create, config),
            pixel_range=config.pixel_range,
        )
    if config.args.keys() & TIMM_ARGUMENTS:
        return MapSource(_create(config), pixel_range=config.pixel_range)
    # Arrow files are pickled as paths. Opening again would contact the hub from every worker.
    return MapSource(open_hfds(config), pixel_range=config.pixel_range)


def open_factory(config: DatasetConfig) -> MapSource:
    """Call the user's function that creates a dataset, with `args` and, if set, `root`.

    Raises:
        ConfigError: the function does not exist.
        DatasetError: the function does not accept these arguments, or raised an error.
    """
    return MapSource(
        _call_factory(config),
        reopen=functools.partial(_call_factory, config),
        pixel_range=config.pixel_range,
    )


def factory_name(name: str) -> str:
    """Return the name without its folder, because the identity must not depend on a location."""
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
        # Libraries print progress to stdout, which is reserved for the output of --json.
        with contextlib.redirect_stdout(sys.stderr):
            return create_dataset(
                config.name, root=config.root, split=config.split, transform=None, **config.args
            )
    except OPEN_ERRORS as error:
        raise DatasetError(
            f"dataset {config.name} ({config.split}) cannot be opened in {config.root}: "
            f"{describe_error(error)}.",
            hint="To fetch it, set dataset.args.download: true."
            if config.name.lower().startswith("torch/") and not config.args.get("download")
            else "",
        ) from error


def _call_factory(config: DatasetConfig) -> Any:
    return call_factory(
        config.name,
        config.args | ({"root": config.root} if config.root is not None else {}),
        makes="dataset",
        given_in="dataset.args",
        error=DatasetError,
    )


class DigitsSource:
    """The digits of one split, in the order of scikit-learn."""

    paths = PathList()
    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, pixels_NHW: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self._pixels_NHW = pixels_NHW
        self.labels = labels

    def read(self, sample: int) -> PIL.Image.Image:
        """Return the digit as an 8 x 8 RGB image with equal channels."""
        return to_rgb(self._pixels_NHW[sample])

    def describe(self, sample: int) -> str:  # noqa: ARG002 - Source's signature
        """Return "", because digits are not files."""
        return ""


def open_digits(config: DatasetConfig) -> DigitsSource:
    """Open a split of the 1,797 handwritten 8 x 8 digits in scikit-learn, without network access.

    Raises:
        DatasetError: the split is unknown, `root` or `args` is set, or scikit-learn is missing.
    """
    if config.split not in {"train", "test"}:
        raise DatasetError(f"dataset digits has splits train and test, not {config.split!r}.")
    if config.root is not None or config.args:
        raise DatasetError("dataset digits takes neither root nor args: it ships in scikit-learn.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError(
            "dataset digits needs scikit-learn.", hint="Run `pip install 'kd-cache[demo]'`."
        ) from error
    digits = load_digits()
    labels = np.asarray(digits.target, np.int64)
    is_same = labels[:, None] == labels[None, :]
    # The number of earlier samples with the same label; every fifth one goes to the test split.
    num_before = np.tril(is_same, -1).sum(axis=1)
    in_test = num_before % TEST_STRIDE == TEST_STRIDE - 1
    in_split = in_test if config.split == "test" else ~in_test
    pixels_NHW = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
    return DigitsSource(pixels_NHW[in_split], labels[in_split])
