"""CIFAR-100 decoded once into memory maps, as a dataset of a build or train file; parts of it too.

Shape letters: N samples, H W pixels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from torchvision.datasets import CIFAR100

from cache_service.errors import DatasetError
from cache_service.storage.local import LocalStorage

FACTORY = "cli.experiments.reproduce.cifar100:cifar100"
"""How a config file names this dataset."""

PARTS = ("train", "test")

NAMES = "classes.json"
"""Written after the pixels and labels of both parts: where it is, they are whole."""

SIDE = 32  # px


class Images:
    """Decoded images of one part by number. Only those that are used are read from disk."""

    def __init__(
        self,
        pixels_NHW3: NDArray[np.uint8],
        labels_N: NDArray[np.int64],
        chosen_N: NDArray[np.int64],
        classes: tuple[str, ...],
        shrink: int,
    ) -> None:
        self.classes = classes
        self.targets = labels_N
        self._pixels_NHW3 = pixels_NHW3
        self._chosen_N = chosen_N
        self._shrink = shrink

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, sample: int) -> tuple[NDArray[np.uint8], int]:
        pixels_HW3 = np.array(self._pixels_NHW3[self._chosen_N[sample]])
        if self._shrink > 1:
            side = SIDE // self._shrink
            blocks = pixels_HW3.reshape(side, self._shrink, side, self._shrink, 3)
            # Whole numbers, halves up: no library rounds here.
            total = blocks.sum(axis=(1, 3), dtype=np.uint32)
            pixels_HW3 = ((total + self._shrink**2 // 2) // self._shrink**2).astype(np.uint8)
        return pixels_HW3, int(self.targets[sample])


class Decoded(NamedTuple):
    """One part: images of each class in turn."""

    pixels_NHW3: NDArray[np.uint8]
    labels_N: NDArray[np.int64]


def cifar100(
    root: str,
    part: str = "train",
    num_classes: int | None = None,
    per_class: int | None = None,
    shrink: int = 1,
) -> Images:
    """Images that `decode` has put into `root`.

    Args:
        root: folder of the memory maps.
        part: train or test.
        num_classes: of so many classes, spread evenly over all; None for all.
        per_class: the first so many of each class; None for all.
        shrink: averages blocks of so many px: 2 makes images of 16 px.

    Raises:
        DatasetError: nothing is decoded there, or there are not so many.
    """
    folder = Path(root)
    if part not in PARTS:
        raise DatasetError(f"cifar100 has parts train and test, not {part!r}.")
    if shrink < 1 or SIDE % shrink:
        raise DatasetError(f"cifar100 has images of {SIDE} px, which shrink={shrink} does not cut.")
    try:
        names = json.loads((folder / NAMES).read_text(encoding="utf-8"))
        pixels_NHW3 = np.load(folder / f"{part}-pixels.npy", mmap_mode="r")
        labels_N = np.load(folder / f"{part}-labels.npy")
    except (OSError, ValueError) as problem:
        raise DatasetError(f"no decoded CIFAR-100 in {folder}: {problem}.") from problem
    count = len(names) if num_classes is None else num_classes
    if not 2 <= count <= len(names):
        raise DatasetError(f"cifar100 has {len(names)} classes, so not num_classes={count}.")
    chosen = np.arange(count) * len(names) // count
    place = np.full(len(names), -1)
    place[chosen] = np.arange(count)
    chosen_N = np.flatnonzero(place[labels_N] >= 0)
    if per_class is not None:
        chosen_N = chosen_N[_nth_of_class(labels_N[chosen_N]) < per_class]
    own_N = place[labels_N[chosen_N]].astype(np.int64)
    return Images(pixels_NHW3, own_N, chosen_N, tuple(names[label] for label in chosen), shrink)


def decode(data: str, into: str) -> None:
    """Decode both parts into the folder `into`, once.

    Args:
        data: a folder with classes.txt and <part>/<class>.webp, lossless strips of a class's
            images below one another; or one with torchvision's cifar-100-python.
        into: where the memory maps go.

    Raises:
        DatasetError: `data` is neither, or a file is damaged.
    """
    if (Path(into) / NAMES).is_file():
        return
    is_strips = (Path(data) / "classes.txt").is_file()
    names, parts = (_read_strips if is_strips else _read_pickles)(Path(data))
    storage = LocalStorage(into)
    for part, decoded in parts:
        order_N = np.lexsort((decoded.labels_N, _nth_of_class(decoded.labels_N)))
        storage.put(f"{part}-pixels.npy", _npy_bytes(decoded.pixels_NHW3[order_N]))
        storage.put(f"{part}-labels.npy", _npy_bytes(decoded.labels_N[order_N]))
    storage.put(NAMES, json.dumps(names).encode())
    storage.sweep()


def _read_strips(folder: Path) -> tuple[list[str], Iterator[tuple[str, Decoded]]]:
    names = (folder / "classes.txt").read_text(encoding="utf-8").split()

    def parts() -> Iterator[tuple[str, Decoded]]:
        for part in PARTS:
            strips = [_read_strip(folder / part / f"{name}.webp") for name in names]
            labels_N = np.repeat(np.arange(len(names)), [len(strip) for strip in strips])
            yield part, Decoded(np.concatenate(strips), labels_N)

    return names, parts()


def _read_strip(path: Path) -> NDArray[np.uint8]:
    try:
        with PIL.Image.open(path) as strip:
            pixels: NDArray[np.uint8] = np.asarray(strip.convert("RGB"))
        return pixels.reshape(-1, SIDE, SIDE, 3)
    except (OSError, ValueError, SyntaxError) as problem:
        raise DatasetError(f"{path} is no strip of {SIDE} px images: {problem}.") from problem


def _read_pickles(folder: Path) -> tuple[list[str], Iterator[tuple[str, Decoded]]]:
    try:
        datasets: dict[str, Any] = {part: CIFAR100(folder, train=part == "train") for part in PARTS}
    except RuntimeError as problem:
        raise DatasetError(
            f"no CIFAR-100 in {folder}: neither classes.txt with strips of its classes nor "
            "cifar-100-python.",
            hint='Fetch it with `python -c "from torchvision.datasets import CIFAR100; '
            f"CIFAR100('{folder}', download=True)\"`, or name its folder with --data.",
        ) from problem
    parts = ((part, Decoded(each.data, np.array(each.targets))) for part, each in datasets.items())
    return datasets["train"].classes, parts


def _nth_of_class(labels_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many earlier samples have the same label, [N]."""
    order_N = np.argsort(labels_N, kind="stable")
    ordered_N = labels_N[order_N]
    starts_N = np.searchsorted(ordered_N, ordered_N)
    nth_N = np.empty_like(labels_N)
    nth_N[order_N] = np.arange(len(labels_N)) - starts_N
    return nth_N


def _npy_bytes(array: NDArray[Any]) -> bytes:
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(array))
    return content.getvalue()
