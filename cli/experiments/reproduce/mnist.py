"""MNIST from its four idx files, as a dataset of a build or train file; classes may be left out.

Shape letters: N samples, H W pixels.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import DatasetError

FACTORY = "cli.experiments.reproduce.mnist:mnist"
"""How a config file names this dataset."""

NUM_CLASSES = 10

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}

ORIGIN = "https://ossci-datasets.s3.amazonaws.com/mnist/"
"""Where torchvision fetches the same four files."""

_UINT8 = 0x08
"""The idx format's code for unsigned bytes."""


class Digits:
    """Grey digits of one split by number."""

    classes = tuple(str(digit) for digit in range(NUM_CLASSES))

    def __init__(self, pixels_NHW: NDArray[np.uint8], labels_N: NDArray[np.uint8]) -> None:
        self._pixels_NHW = pixels_NHW
        self.targets = labels_N.astype(np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, sample: int) -> tuple[NDArray[np.uint8], int]:
        return self._pixels_NHW[sample], int(self.targets[sample])


def mnist(root: str, part: str = "train", omit: Sequence[int] = ()) -> Digits:
    """The digits of `part`, train or test, less those whose class is in `omit`.

    Raises:
        DatasetError: there is no such part, a file is missing or damaged, or nothing is left.
    """
    if part not in FILES:
        raise DatasetError(f"mnist has parts train and test, not {part!r}.")
    images_path, labels_path = (Path(root) / name for name in FILES[part])
    pixels_NHW = _read_idx(images_path, num_dims=3)
    labels_N = _read_idx(labels_path, num_dims=1)
    if len(pixels_NHW) != len(labels_N):
        raise DatasetError(
            f"{images_path} has {len(pixels_NHW)} images and {labels_path.name} has "
            f"{len(labels_N)} labels: they are not of one dataset."
        )
    kept_N = ~np.isin(labels_N, list(omit))
    if not kept_N.any():
        raise DatasetError(f"mnist {part} without classes {sorted(omit)} has no images left.")
    return Digits(pixels_NHW[kept_N], labels_N[kept_N])


def mnist_document(root: str, part: str, omit: Sequence[int] = ()) -> dict[str, Any]:
    """`dataset:` of a build or train file."""
    args: dict[str, Any] = {"part": part}
    if omit:
        args["omit"] = list(omit)
    return {"name": FACTORY, "root": root, "split": part, "args": args}


def _read_idx(path: Path, *, num_dims: int) -> NDArray[np.uint8]:
    """An idx file: two zeros, type, number of dimensions, sizes as big-endian uint32, bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as problem:
        raise DatasetError(
            f"mnist found no {path.name} in {path.parent}.",
            hint=f"Put {', '.join(name for names in FILES.values() for name in names)} there "
            f"(from {ORIGIN}), or name their folder with --data.",
        ) from problem
    except (OSError, EOFError, zlib.error) as problem:
        raise DatasetError(
            f"{path} cannot be read: {' '.join(str(problem).split())}.", hint="Fetch it again."
        ) from problem
    header = 4 + 4 * num_dims
    if len(content) < header or content[:4] != bytes([0, 0, _UINT8, num_dims]):
        raise DatasetError(f"{path} is no idx file of bytes in {num_dims} dimensions.")
    shape = struct.unpack(f">{num_dims}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise DatasetError(
            f"{path} says it holds {' x '.join(map(str, shape))} bytes, and holds "
            f"{len(content) - header}.",
            hint="Fetch it again.",
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
