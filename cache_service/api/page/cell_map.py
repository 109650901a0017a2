"""The teacher's answers to the cells of one scale, drawn over the view: pure functions of numbers.

The report of `kd-cache demo` draws with these too.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import NamedTuple

SIDE = 240
"""Units of a square drawing, whatever the view's size."""

INSET = 3
"""Units between a cell's edge and its frame: neighbors' frames lie side by side."""

PLATE_HEIGHT = 40
"""Units of the plate behind a cell's two lines of text."""

CHARACTER = 9.0
"""Units of a character of a verdict, bold at 15 px, and a little more."""

SMALL_CHARACTER = 6.9
"""The same at 11.5 px, for cells in which the verdict would not fit otherwise."""

SCALE: tuple[tuple[int, int, int], ...] = (
    (59, 28, 110),
    (62, 73, 137),
    (38, 130, 142),
    (53, 183, 121),
    (253, 231, 37),
)
"""Low to high: dark violet to yellow, rising in lightness all the way, so that it also reads in
grey and to color-blind eyes. After Smith and van der Walt's viridis."""


class Cell(NamedTuple):
    """One cell of a map.

    Attributes:
        share: place on the color scale, 0 low and 1 high.
        verdict: the class that it names, short.
        value: the figure that its color stands for.
        complementary: whether exactly one of the verdicts on the cell and on the whole image names
            the label; None where no label is known.
        told: all of it in words.
    """

    share: float
    verdict: str
    value: str
    complementary: bool | None
    told: str


def cell_map(scale: int, cells: Iterable[Cell], *, under: str, label: str) -> str:
    """The m x m cells of one scale, row by row, each tinted, framed and named.

    Args:
        scale: m.
        cells: m * m of them.
        under: SVG below the tints.
        label: what a screen reader says.
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
            f"<g><title>{escape(cell.told)}</title>"
            f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" '
            f'fill="{scale_color(cell.share)}" fill-opacity="0.62"/>'
            f'<path class="halo" d="{frame}"/><path class="cell{kind}" d="{frame}"/>'
            f"{_plate(x + size / 2, y + size / 2, cell, size)}</g>"
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


def scale_color(share: float) -> str:
    """Color at a share of the scale, 0 low and 1 high; beyond the ends, that of the end."""
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    first = min(int(place), len(SCALE) - 2)
    pairs = zip(SCALE[first], SCALE[first + 1], strict=True)
    return hex_color(round(a + (b - a) * (place - first)) for a, b in pairs)


def hex_color(rgb: Iterable[int]) -> str:
    """`#rrggbb`."""
    red, green, blue = (int(part) for part in rgb)
    return f"#{red:02x}{green:02x}{blue:02x}"


def drawing(kind: str, label: str, content: str) -> str:
    """A square drawing that is one image to a screen reader."""
    return (
        f'<svg class="{kind}" viewBox="0 0 {SIDE} {SIDE}" role="img" '
        f'aria-label="{escape(label)}">{content}</svg>'
    )


def shorten(name: str, most: int) -> str:
    """A name of at most so many characters; what is cut off is an ellipsis."""
    return name if len(name) <= most else name[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _plate(x: float, y: float, cell: Cell, size: float) -> str:
    """Verdict over value, on a plate that keeps them readable over any color; none if too small."""
    if size < PLATE_HEIGHT + 2 * INSET:
        return ""
    room = size - 4 * INSET
    small = len(cell.verdict) * CHARACTER > room
    wide = SMALL_CHARACTER if small else CHARACTER
    verdict = shorten(cell.verdict, int(room / wide))
    width = min(max(42.0, len(verdict) * wide + 10), room + 6)
    return (
        f'<rect class="plate" x="{x - width / 2:g}" y="{y - 20:g}" width="{width:g}" '
        f'height="{PLATE_HEIGHT}" rx="6"/>'
        f'<text class="verdict{" small" if small else ""}" x="{x:g}" y="{y - 1:g}" '
        f'text-anchor="middle">{escape(verdict)}</text>'
        f'<text class="logit" x="{x:g}" y="{y + 14:g}" text-anchor="middle">'
        f"{escape(cell.value)}</text>"
    )
