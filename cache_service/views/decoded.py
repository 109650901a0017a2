"""Decoded images, kept until the last of their views in a seed is made."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import numpy as np
from google_crc32c import value as crc32c
from PIL import Image

from cache_service.errors import DatasetError

MAX_BYTES = 256 << 20
"""Decoded images that one process keeps at most, 256 MiB. A window of 16 images of ImageNet takes
12 MiB, and one of 16 photographs of 4 million pixels fills it."""

BYTES_PER_PIXEL = 4
"""Pillow stores RGB with a fourth byte."""


class ImageSource(Protocol):
    """The part of a dataset that views need."""

    def __len__(self) -> int: ...

    def image(self, sample: int) -> Image.Image:
        """The decoded image of a sample, in mode RGB."""
        ...


class DecodedImage:
    """An image in RGB.

    Attributes:
        image: the pixels.
    """

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self._stamp: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """Its size in memory."""
        return BYTES_PER_PIXEL * self.image.width * self.image.height

    def stamp(self) -> bytes:
        """Size and checksum of the pixels, computed on first use.

        CRC-32C, because it is there to notice another decoder or file, not to withstand a forger,
        and hashing the source of an ImageNet view costs 20 us this way and 600 us by BLAKE2b.
        """
        if self._stamp is None:
            checksum = crc32c(self.image.tobytes())
            self._stamp = np.array([*self.image.size, checksum], dtype="<i8").tobytes()
        return self._stamp


class DecodedImages:
    """The images of a dataset, each decoded once for `repeats` uses that follow closely.

    An image that is used once only is not kept. Keeping one changes no pixel: ops never change the
    image that they are given, and a user's pipeline gets a copy.
    """

    def __init__(self, dataset: ImageSource, repeats: int, *, max_bytes: int = MAX_BYTES) -> None:
        self._dataset = dataset
        self._repeats = repeats
        self._max_bytes = max_bytes
        self._kept: OrderedDict[int, tuple[DecodedImage, int]] = OrderedDict()
        self.num_bytes = 0

    def get(self, sample: int) -> DecodedImage:
        """The image of a sample.

        Raises:
            DatasetError: it cannot be decoded, or is not RGB.
        """
        kept = self._kept.pop(sample, None)
        if kept is None:
            decoded, uses_left = self._decode(sample), self._repeats
        else:
            decoded, uses_left = kept
            self.num_bytes -= decoded.num_bytes
        if uses_left > 1 and decoded.num_bytes <= self._max_bytes:
            self._kept[sample] = decoded, uses_left - 1
            self.num_bytes += decoded.num_bytes
            while self.num_bytes > self._max_bytes:
                _, (oldest, _) = self._kept.popitem(last=False)
                self.num_bytes -= oldest.num_bytes
        return decoded

    def _decode(self, sample: int) -> DecodedImage:
        image = self._dataset.image(sample)
        if image.mode != "RGB":
            raise DatasetError(
                f"sample {sample} came as a {image.mode} image; views are made of RGB.",
                hint="Convert in the dataset: image.convert('RGB').",
            )
        return DecodedImage(image)
