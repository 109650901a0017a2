"""Reads image files, and tells why one cannot be read.

The rules, which docs/augmentation.md states: of a file with several frames or pages the first is
read; the orientation in EXIF and color profiles are not applied; a damaged file is refused, never
completed with gray; so is an image of more pixels than Pillow accepts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import PIL.Image
import PIL.ImageFile

from cache_service.human_format import describe_error

# Pillow warns above half of the limit at which it refuses. These images are read.
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml")
REPAIR = "Repair the file: a dataset without it is another dataset."
CORRECT = "Correct what the dataset gives for this sample."
AGAIN = "Copy, download or convert the file again: a dataset without it is another dataset."
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
ISO_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}


@contextmanager
def open_image(file: Path) -> Iterator[PIL.Image.Image]:
    """Open a file, whose pixels are decoded on use. Raises one of DECODE_ERRORS if that fails."""
    # Programs set this for all of Pillow, to complete damaged files with gray.
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False
    if file.is_fifo():  # opening it would wait for somebody who writes to it
        raise OSError("it is a named pipe")
    with file.open("rb") as stream, PIL.Image.open(stream) as image:
        yield image


def describe_damage(file: Path, error: Exception) -> tuple[str, str]:
    """Why a file is no image, and what to do about it.

    Args:
        file: of the sample; need not exist.
        error: that reading it raised.
    """
    if isinstance(error, PIL.Image.DecompressionBombError):
        hint = (
            "Resize the image, or raise PIL.Image.MAX_IMAGE_PIXELS in a dataset of your own "
            "(module:factory)."
        )
        return describe_error(error), hint
    if file.is_fifo():
        return describe_error(error), REPAIR
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError:  # a sample without a file, unless the file cannot be read
        return describe_error(error), REPAIR if isinstance(error, OSError) else CORRECT
    wrong = _wrong_content(head)
    if wrong is None and isinstance(error, PIL.UnidentifiedImageError):
        known = head.startswith(SIGNATURES)
        wrong = "the file is damaged" if known else f"no image format begins with {head[:8]!r}"
    return (describe_error(error), REPAIR) if wrong is None else (wrong, AGAIN)


def _wrong_content(head: bytes) -> str | None:
    """What a file is, by its first bytes, if it is no image or none that Pillow may know."""
    brand = ISO_BRANDS.get(head[8:12]) if head[4:8] == b"ftyp" else None
    is_page = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(PAGES)
    kinds = {
        "the file is empty (0 bytes)": not head,
        "the file is a Git LFS pointer, which `git lfs pull` replaces by the image": (
            head.startswith(LFS_POINTER)
        ),
        "the file is an HTML or XML page, as servers send in place of a file": is_page,
        f"the file is a {brand} image, which this Pillow cannot decode": brand is not None,
    }
    return next((kind for kind, is_it in kinds.items() if is_it), None)
