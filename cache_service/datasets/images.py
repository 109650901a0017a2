"""One dataset as everything else sees it: numbered RGB images, labels, and an identity."""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from cache_service.datasets.pixels import DECODE_ERRORS, PixelRangeError, one_line
from cache_service.errors import DatasetError, UnreadableSampleError
from cache_service.format.canonical import canonical_json, sha256_hex
from cache_service.format.spec import DatasetId

NUM_PROBES = 64
"""Samples whose pixels enter the identity: about half a second of decoding on ImageNet."""

NUM_REPEATS = 8
"""Probes read twice: a random flip left inside a dataset stays hidden once in 2**8 times."""


class Source(Protocol):
    """Where samples come from. Picklable; opens its files after the trip, not before."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels [N], without decoding an image where that can be avoided."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label, () where the dataset does not say."""

    @property
    def paths(self) -> bytes:
        """Paths below the root, joined by NUL; empty where samples are not files."""

    def read(self, sample: int) -> PIL.Image.Image:
        """The image in RGB; raises one of DECODE_ERRORS."""

    def describe(self, sample: int) -> str:
        """The sample's path, "" where there is none."""


class ImageDataset:
    """A dataset by sample number. Cheap to send to another process."""

    def __init__(self, source: Source, *, name: str, split: str) -> None:
        self._source = source
        self._label = f"{name} ({split})"
        self.labels = source.labels
        self.labels.flags.writeable = False
        self.classes = source.classes
        self.id = DatasetId(
            name=name,
            split=split,
            num_samples=len(self),
            num_classes=self._check_labels(),
            sha256=self._digest(),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, sample: int) -> tuple[PIL.Image.Image, int]:
        return self.image(sample), int(self.labels[sample])

    def __repr__(self) -> str:
        return f"ImageDataset({self._label}, {len(self)} samples)"

    def image(self, sample: int) -> PIL.Image.Image:
        """The decoded image, RGB.

        Raises:
            IndexError: no such sample.
            DatasetError: its pixels are not 8 bits deep, and no range fits them.
            UnreadableSampleError: the sample is there and cannot be decoded.
        """
        sample = int(sample)
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {self._label}, which has {len(self)} samples")
        try:
            return self._source.read(sample)
        except PixelRangeError as error:
            raise DatasetError(
                f"sample {sample} of {self._label} ({self.describe(sample)}): {error}.",
                hint="Set dataset.pixel_range (or pixel_range of wrap_dataset) to the values of "
                "black and white, such as [0, 65535] or [0, 1].",
            ) from error
        except DECODE_ERRORS as error:
            raise UnreadableSampleError(
                f"sample {sample} of {self._label} cannot be decoded: {self.describe(sample)}: "
                f"{one_line(error)}.",
                hint="Repair or remove it; a dataset without it is another dataset.",
            ) from error

    def describe(self, sample: int) -> str:
        """Where the sample lies, for messages: its path where it has one."""
        return self._source.describe(sample) or f"sample {sample}"

    def _check_labels(self) -> int:
        """Number of classes; refuses labels that no classifier could learn."""
        if not len(self):
            raise DatasetError(f"dataset {self._label} has no samples.")
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        num_classes = len(self.classes) or highest + 1
        if lowest < 0 or highest >= num_classes:
            bad = int(np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))[0])
            raise DatasetError(
                f"dataset {self._label} has {num_classes} classes, but sample {bad} "
                f"({self.describe(bad)}) has label {self.labels[bad]}; labels are 0 to "
                f"{num_classes - 1}."
            )
        if num_classes < 2:
            raise DatasetError(
                f"dataset {self._label} has one class only; there is nothing to tell apart."
            )
        return num_classes

    def _digest(self) -> str:
        """Identity: size, class names, labels, paths below the root, pixels of the probes."""
        count = min(NUM_PROBES, len(self))
        probes = [i * (len(self) - 1) // max(count - 1, 1) for i in range(count)]
        pixels = [_pixel_digest(self.image(sample)) for sample in probes]
        for sample, first in list(zip(probes, pixels, strict=True))[:NUM_REPEATS]:
            if _pixel_digest(self.image(sample)) != first:
                raise DatasetError(
                    f"dataset {self._label} gave two different images for sample {sample}.",
                    hint="Open it without random transforms: augmentation belongs in `augment`.",
                )
        document = {
            "num_samples": len(self),
            "classes": list(self.classes) or None,
            "labels": sha256_hex(self.labels.astype("<i8").tobytes()),
            "paths": sha256_hex(self._source.paths) if self._source.paths else None,
            "pixels": pixels,
        }
        return sha256_hex(canonical_json(document))


def _pixel_digest(image: PIL.Image.Image) -> str:
    """sha256 of size and pixels: 4 x 2 and 2 x 4 images may have the same bytes."""
    digest = hashlib.sha256(b"%d,%d," % image.size)
    digest.update(image.tobytes())
    return digest.hexdigest()
