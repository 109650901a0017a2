"""Images that are not 8 bits deep: a stated range, or a refusal."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from pydantic import ValidationError
from torchvision.datasets import ImageFolder

from cache_service.datasets import DatasetConfig, open_dataset, wrap_dataset
from cache_service.errors import DatasetError

RAMP = np.array([[0, 257, 1000], [32768, 65278, 65535]], np.uint16)
"""Over all 16 bits."""

ON_8_BITS = np.array([[0, 1, 4], [128, 254, 255]], np.uint8)
FULL = (0, 65535)


def red(dataset, sample=0):
    return np.asarray(dataset.image(sample))[..., 0]


def pair(image, **options):
    return wrap_dataset([(image, 0), (image, 1)], **options)


@pytest.fixture
def deep_folder(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        PIL.Image.fromarray(RAMP).save(tmp_path / name / "0.png")
    return tmp_path


def png_of_16_bit_rgb(path):
    """Pillow writes none, and reads them to 8 bits without saying so."""
    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, 1).astype(">u2").tobytes() for row in RAMP)

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def opened(root, **settings):
    return open_dataset(DatasetConfig(name="folder", root=str(root), **settings))


def test_16_bit_files_without_a_range_are_refused_with_their_values_and_the_setting(deep_folder):
    with pytest.raises(DatasetError, match=r"ant/0.png.*I;16 with values from 0 to 65535") as error:
        opened(deep_folder)
    assert "dataset.pixel_range" in error.value.hint
    assert "Repair the file" not in str(error.value)


def test_16_bit_files_are_mapped_linearly_from_the_stated_range(deep_folder):
    assert (red(opened(deep_folder, pixel_range=FULL)) == ON_8_BITS).all()


def test_values_outside_of_the_range_are_refused_never_clipped(deep_folder):
    with pytest.raises(DatasetError, match=r"values from 0 to 65535, outside of pixel_range"):
        opened(deep_folder, pixel_range=(0, 4095))


def test_16_bit_color_files_are_right_over_their_full_range_only(deep_folder):
    for name in ("ant", "bee"):
        png_of_16_bit_rgb(deep_folder / name / "0.png")
    for settings in ({}, {"pixel_range": (0, 4095)}):
        with pytest.raises(DatasetError, match="16 bits a color, of which Pillow keeps the upper"):
            opened(deep_folder, **settings)
    assert (red(opened(deep_folder, pixel_range=FULL)) == RAMP >> 8).all()


def test_torchvisions_image_folder_is_read_without_its_clipping_loader(deep_folder):
    with pytest.raises(DatasetError, match="nothing says which value is white"):
        wrap_dataset(ImageFolder(deep_folder))
    wrapped = wrap_dataset(ImageFolder(deep_folder), pixel_range=FULL)
    assert (red(wrapped) == ON_8_BITS).all()
    assert wrapped.classes == ("ant", "bee")
    assert wrapped.describe(1).endswith("bee/0.png")


@pytest.mark.parametrize(
    ("image", "pixel_range"),
    [
        (PIL.Image.fromarray(RAMP), FULL),
        (PIL.Image.fromarray(RAMP.astype(np.int32)), FULL),
        (PIL.Image.fromarray((RAMP / 65535).astype(np.float32)), (0, 1)),
        (RAMP, FULL),
        (RAMP[..., None].repeat(3, 2), FULL),
        (RAMP.astype(np.int64), FULL),
        ((RAMP / 65535).astype(np.float64), (0, 1)),
        (torch.tensor(RAMP / 32767.5 - 1)[..., None], (-1, 1)),
    ],
    ids=["I;16", "I", "F", "uint16", "uint16 color", "int64", "float64", "tensor"],
)
def test_every_deep_type_needs_a_range_and_follows_it(image, pixel_range):
    with pytest.raises(DatasetError, match="nothing says which value is white"):
        pair(image)
    assert (red(pair(image, pixel_range=pixel_range)) == ON_8_BITS).all()


def test_booleans_are_black_and_white_once_a_range_says_so():
    image = np.array([[True, False]])
    assert red(pair(image, pixel_range=(0, 1))).tolist() == [[255, 0]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.1])
def test_values_that_no_range_holds_are_refused(value):
    image = np.full((2, 2), 0.5)
    image[0, 0] = value
    with pytest.raises(DatasetError, match="outside of pixel_range"):
        pair(image, pixel_range=(0, 1))


def test_8_bit_pixels_stay_as_they_are_beside_a_range():
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (red(pair(image, pixel_range=FULL)) == image).all()


@pytest.mark.parametrize("pixel_range", [(1, 0), (5, 5), (0, float("nan")), (0,)])
def test_a_range_names_black_and_then_white(pixel_range):
    with pytest.raises(ValidationError, match="pixel_range"):
        DatasetConfig(name="folder", pixel_range=pixel_range)
