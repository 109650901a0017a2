"""SVG and PNG pictures of the pages: cells of a view, the color scale, recorded shards.

Every function here is pure: numbers in, text out. The report of `kd-cache demo` uses them, too, so
nothing here needs the libraries of the service.

Shape letters: H W pixels, Y X boxes of a picture.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIDE = 240
"""Units of a square drawing, whatever the view's size."""

INSET = 3
"""Units between a cell's edge and its frame, so that the frames of neighbors lie side by side."""

CHIP_FONT, SMALLEST_FONT = 11.0, 6.0
"""Units of the text on a cell's chip, and below which a cell is too small for a chip."""

FONT_PART = 0.24
"""Size of the text as a part of a small cell's side."""

CHARACTER = 0.6
"""Width of a character as a part of its size."""

SCALE: tuple[tuple[int, int, int], ...] = (
    (59, 28, 110),
    (62, 73, 137),
    (38, 130, 142),
    (53, 183, 121),
    (253, 231, 37),
)
"""Low to high: dark violet to yellow. Its lightness rises from end to end, so it can also be read
in gray and by color-blind people. After Smith and van der Walt's viridis."""

COVERAGE_WIDTH = 960
"""Units of a coverage picture's width; the page stretches it to the available width."""

ROW_HEIGHT, LOW_ROW_HEIGHT = 12, 7
"""Units, and pixels on the page, from one row to the next: of a few rows, and of many."""

FEW_ROWS = 12

GAP = 2
"""Units between boxes."""


class Cell(NamedTuple):
    """One cell of a map.

    Attributes:
        fraction: place on the color scale, 0 low and 1 high.
        mark: stands for the class predicted from the cell: a few characters.
        value: the figure that the color stands for, short.
        complementary: whether exactly one of the predictions from the cell and from the whole image
            is the label; None if no label is known.
        description: all of it in words.
    """

    fraction: float
    mark: str
    value: str
    complementary: bool | None
    description: str


def cell_map(scale: int, cells: Iterable[Cell], *, under: str, label: str) -> str:
    """The m x m cells of one scale, row by row, each with a tint, a frame and a chip.

    Args:
        scale: m.
        cells: m * m of them.
        under: SVG below the tints.
        label: text for screen readers.
    """
    size = SIDE / scale
    parts = []
    for index, cell in enumerate(cells):
        row, column = divmod(index, scale)
        x, y = column * size, row * size
        inner = size - 2 * INSET
        frame = f"M{x + INSET:g} {y + INSET:g}h{inner:g}v{inner:g}h{-inner:g}Z"
        kind = {True: " complementary", False: " consistent", None: ""}[cell.complementary]
        parts.append(
            f"<g><title>{escape(cell.description)}</title>"
            f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" '
            f'fill="{scale_color(cell.fraction)}" fill-opacity="0.5"/>'
            f'<path class="halo" d="{frame}"/><path class="cell{kind}" d="{frame}"/>'
            f"{_chip(x + 2 * INSET, y + 2 * INSET, cell, size)}</g>"
        )
    return drawing("map", label, under + "".join(parts))


def scale_bar(low: str, high: str, label: str) -> str:
    """The color scale with the figures at its ends."""
    stops = "".join(
        f'<stop offset="{index / (len(SCALE) - 1):g}" stop-color="{hex_color(color)}"/>'
        for index, color in enumerate(SCALE)
    )
    return (
        f'<svg class="scale" viewBox="0 0 {SIDE} 40" role="img" aria-label="{escape(label)}">'
        f'<defs><linearGradient id="scale-colors">{stops}</linearGradient></defs>'
        f'<rect width="{SIDE}" height="16" rx="2" fill="url(#scale-colors)"/>'
        f'<text x="0" y="34">{escape(low)}</text>'
        f'<text x="{SIDE}" y="34" text-anchor="end">{escape(high)}</text></svg>'
    )


def scale_color(fraction: float) -> str:
    """The color at a fraction of the scale, 0 low and 1 high, clipped to its ends."""
    place = min(max(fraction, 0.0), 1.0) * (len(SCALE) - 1)
    first = min(int(place), len(SCALE) - 2)
    pairs = zip(SCALE[first], SCALE[first + 1], strict=True)
    return hex_color(round(a + (b - a) * (place - first)) for a, b in pairs)


def hex_color(rgb: Iterable[int]) -> str:
    """`#rrggbb`."""
    red, green, blue = (int(part) for part in rgb)
    return f"#{red:02x}{green:02x}{blue:02x}"


def drawing(kind: str, label: str, content: str) -> str:
    """A square drawing, which is one image to a screen reader."""
    return (
        f'<svg class="{kind}" viewBox="0 0 {SIDE} {SIDE}" role="img" '
        f'aria-label="{escape(label)}">{content}</svg>'
    )


def coverage_picture(levels_YX: NDArray[np.int64], label: str) -> str:
    """A row of boxes for each seed, colored by how much of each box is recorded.

    The colors are classes of the page's style sheet. Boxes of one color are one path, so that the
    picture of 300 seeds x 1,000 shards is as small as that of 30 x 64.

    Args:
        levels_YX: 0 for nothing to 4 for everything, one per box.
        label: text for screen readers.
    """
    height, width = levels_YX.shape
    box = COVERAGE_WIDTH / max(width, 1)
    row = ROW_HEIGHT if height <= FEW_ROWS else LOW_ROW_HEIGHT
    paths: dict[int, list[str]] = {}
    for y, levels_X in enumerate(levels_YX.tolist()):
        for x, level in enumerate(levels_X):
            left = round(x * box, 1)
            right = round((x + 1) * box - (GAP if x < width - 1 else 0), 1)
            path = f"M{left:g} {y * row}H{right:g}v{row - GAP}H{left:g}Z"
            paths.setdefault(level, []).append(path)
    boxes = "".join(
        f'<path class="have{level}" d="{"".join(paths[level])}"/>' for level in sorted(paths)
    )
    tall = max(height * row - GAP, 1)
    return (
        f'<svg class="coverage" viewBox="0 0 {COVERAGE_WIDTH} {tall}" width="{COVERAGE_WIDTH}" '
        f'height="{tall}" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f"{boxes}</svg>"
    )


def png_data_url(pixels_HW3: NDArray[np.uint8]) -> str:
    """uint8 pixels as the address of a PNG image.

    The server shows views that a cache stores even where Pillow is not installed, and never loads
    Pillow itself; this subset of PNG needs zlib only.

    Source: PNG specification, third edition: signature, IHDR, IDAT, IEND.
    """
    height, width = pixels_HW3.shape[:2]
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # the first byte of a line: no filter
    lines[:, 1:] = pixels_HW3.reshape(height, 3 * width)
    # 8 bits per channel, RGB, and the only compression, filter and interlace methods there are.
    header = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(lines.tobytes())),
        (b"IEND", b""),
    ):
        checksum = zlib.crc32(kind + body)
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _chip(x: float, y: float, cell: Cell, size: float) -> str:
    """Mark and value on a dark chip in the cell's corner, which covers less than a quarter of it.

    The value is left out where it does not fit, and the chip where its text would be too small.
    """
    font = min(CHIP_FONT, FONT_PART * size)
    if font < SMALLEST_FONT:
        return ""
    height, room = 1.4 * font, size - 4 * INSET
    for text in (f"{cell.mark} {cell.value}", cell.mark):
        width = CHARACTER * font * len(text) + font / 2
        if width <= room and width * height < size * size / 4:
            break
    else:
        return ""
    value = f" {escape(cell.value)}" if text != cell.mark else ""
    return (
        f'<g font-size="{font:g}"><rect class="chip" x="{x:g}" y="{y:g}" width="{width:g}" '
        f'height="{height:g}" rx="{font / 4:g}"/><text class="onchip" x="{x + width / 2:g}" '
        f'y="{y + 1.05 * font:g}" text-anchor="middle"><tspan class="mark">{escape(cell.mark)}'
        f"</tspan>{value}</text></g>"
    )
