"""Files that are no images, or unusual ones: read by the stated rule, or refused by their path."""

from __future__ import annotations

import os

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
from PIL import ImageCms

from cache_service.datasets import DatasetConfig, open_dataset, wrap_dataset
from cache_service.errors import UnreadableSampleError

FIRST, SECOND = (200, 30, 40), (10, 220, 60)


def opened(root):
    return open_dataset(DatasetConfig(name="folder", root=str(root)))


def frames(size=(8, 6)):
    return [PIL.Image.new("RGB", size, color) for color in (FIRST, SECOND)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>404", "HTML or XML page"),
        (b"\0\0\0\x1cftypheic\0\0\0\0mif1heic", "is a HEIC image, which this Pillow cannot"),
        (b"RIFF\0\0\0\0AVI LIST", r"no image format begins with b'RIFF"),
        (b"\x89PNG\r\n\x1a\n", "the file is damaged"),
    ],
    ids=["empty", "lfs", "html", "heic", "other", "header"],
)
def test_a_file_that_is_no_image_is_called_what_it_is(folder, content, says):
    (folder / "bee" / "0.png").write_bytes(content)
    with pytest.raises(UnreadableSampleError, match=rf"sample 4 .*bee/0\.png.*{says}") as refusal:
        opened(folder)
    assert "\n" not in str(refusal.value)


def test_a_truncated_file_is_refused_even_where_pillow_is_told_to_complete_it(folder, monkeypatch):
    dataset = opened(folder)
    path = folder / "bee" / "0.png"
    PIL.Image.effect_noise((64, 64), 50).convert("RGB").save(path, "jpeg")
    path.write_bytes(path.read_bytes()[:900])
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UnreadableSampleError, match=r"bee/0\.png.*truncated"):
        dataset.image(4)


@pytest.mark.parametrize(
    ("ending", "options"),
    [("png", {}), ("webp", {"lossless": True}), ("tiff", {}), ("jpg", {"format": "MPO"})],
    ids=["apng", "webp", "pages", "mpo"],
)
def test_the_first_frame_or_page_is_read(folder, ending, options):
    path = folder / "ant" / f"-.{ending}"
    first, second = frames()
    first.save(path, save_all=True, append_images=[second], **options)
    with PIL.Image.open(path) as image:
        assert image.n_frames == 2
    pixels = np.asarray(opened(folder).image(0)).astype(int)
    assert np.abs(pixels - FIRST).max() <= (2 if ending == "jpg" else 0)


def test_the_orientation_in_exif_is_not_applied(folder):
    image = PIL.Image.new("RGB", (12, 6), FIRST)
    exif = image.getexif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees
    image.save(folder / "ant" / "0.jpg", exif=exif)
    assert opened(folder).image(0).size == (12, 6)


def test_color_profiles_are_not_applied(folder):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    frames()[0].save(folder / "ant" / "0.png", icc_profile=profile)
    assert opened(folder).image(0).getpixel((0, 0)) == FIRST


def test_a_cmyk_jpeg_is_converted_to_the_colors_that_it_shows(folder):
    PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(folder / "ant" / "0.jpg", quality=100)
    assert np.abs(np.array(opened(folder).image(0).getpixel((8, 8))) - (255, 0, 0)).max() <= 2


def test_one_bit_means_black_and_white(folder):
    image = PIL.Image.new("1", (4, 2), 0)
    image.putpixel((1, 0), 1)
    image.save(folder / "ant" / "0.png")
    read = opened(folder).image(0)
    assert [read.getpixel((0, 0)), read.getpixel((1, 0))] == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_above_pillows_limit_is_refused_and_one_below_is_read(folder, monkeypatch):
    PIL.Image.new("L", (300, 100)).save(folder / "ant" / "0.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 20_000)  # refused above twice that
    assert opened(folder).image(0).size == (300, 100)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 14_000)
    with pytest.raises(UnreadableSampleError, match=r"sample 0 .*ant/0\.png.*30000 pixels") as no:
        opened(folder)
    assert "Resize the image, or raise PIL.Image.MAX_IMAGE_PIXELS" in no.value.hint


def test_a_named_pipe_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "ant" / "4.png")
    with pytest.raises(UnreadableSampleError, match=r"sample 4 .*ant/4\.png: OSError: it is a nam"):
        opened(folder)


def test_names_of_any_bytes_are_read_and_printed(folder):
    (folder / "ant" / "0.png").rename(folder / "ant" / os.fsdecode(b"\xff\n.png"))
    (folder / "ant" / os.fsdecode(b"\xfe\n.gif")).write_bytes(b"")
    dataset = opened(folder)
    assert len([dataset.image(sample) for sample in range(12)]) == 12
    assert r"ant/\xfe\n.gif" in dataset.left_out
    assert "\n" not in dataset.left_out.encode().decode()


@pytest.mark.parametrize(
    "image",
    [PIL.Image.new("RGB", (0, 4)), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 0), np.uint8)],
    ids=["pil", "rows", "columns"],
)
def test_an_image_without_pixels_is_refused(image):
    with pytest.raises(
        UnreadableSampleError, match=r"sample 0 .*(0 x 4 pixels|has no pixels)"
    ) as e:
        wrap_dataset([(image, 0), (image, 1)])
    assert e.value.hint == "Correct what the dataset gives for this sample."
