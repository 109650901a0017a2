"""A view and the teacher's answers to its cells, as SVG text: pure functions of numbers.

Shape letters: H W pixels.
"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cli.demo.result import CellGrid

SIDE = 240
"""Units of a square drawing, whatever the view's size."""

INSET = 3
"""Units between a cell's edge and its frame: neighbors' frames lie side by side."""

VIEW_ID = "the-view"
"""Name of the one drawing of the pixels, which every map lies on."""

Pixels = NDArray[np.uint8]

SCALE: tuple[tuple[int, int, int], ...] = (
    (59, 28, 110),
    (62, 73, 137),
    (38, 130, 142),
    (53, 183, 121),
    (253, 231, 37),
)
"""Low to high: dark violet to yellow, rising in lightness all the way, so that it also reads in
grey and to color-blind eyes. After Smith and van der Walt's viridis."""


def view_symbol(pixels_HW3: Pixels) -> str:
    """The pixels, drawn once, out of sight; `view_image` and `cell_map` show it."""
    height, width = pixels_HW3.shape[:2]
    parts = []
    for y in range(height):
        x = 0
        while x < width:  # one box for each run of equal pixels
            run = 1
            while x + run < width and (pixels_HW3[y, x + run] == pixels_HW3[y, x]).all():
                run += 1
            color = hex_color(pixels_HW3[y, x])
            parts.append(f'<path fill="{color}" d="M{x} {y}h{run}v1h-{run}Z"/>')
            x += run
    return (
        '<svg class="hidden" aria-hidden="true" width="0" height="0"><defs>'
        f'<symbol id="{VIEW_ID}" viewBox="0 0 {width} {height}" shape-rendering="crispEdges">'
        f"{''.join(parts)}</symbol></defs></svg>"
    )


def view_image(label: str) -> str:
    """The view alone."""
    return _image(label, [])


def cell_map(grid: CellGrid, *, label: str, low: float, high: float) -> str:
    """One scale: each cell tinted by its logit of the label's class, with its verdict written in.

    Args:
        grid: the cells.
        label: what a screen reader says.
        low, high: logits at the ends of the color scale, the same for every scale of a view.
    """
    size = SIDE / grid.scale
    parts = []
    for index in range(grid.scale * grid.scale):
        row, column = divmod(index, grid.scale)
        x, y = column * size, row * size
        share = (grid.label_logit[index] - low) / (high - low) if high > low else 0.5
        inner = size - 2 * INSET
        frame = f"M{x + INSET:g} {y + INSET:g}h{inner:g}v{inner:g}h{-inner:g}Z"
        kind = "complementary" if grid.complementary[index] else "consistent"
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" '
            f'fill="{scale_color(share)}" fill-opacity="0.62"/>'
            f'<path class="halo" d="{frame}"/><path class="cell {kind}" d="{frame}"/>'
        )
        parts.append(_verdict(x + size / 2, y + size / 2, grid, index))
    return _image(label, parts)


def scale_bar(low: float, high: float) -> str:
    """The color scale with the logits at its ends."""
    stops = "".join(
        f'<stop offset="{index / (len(SCALE) - 1):g}" stop-color="{hex_color(color)}"/>'
        for index, color in enumerate(SCALE)
    )
    return (
        f'<svg class="scale" viewBox="0 0 {SIDE} 40" role="img" '
        f'aria-label="Color scale from a logit of {low:.1f}, dark, to {high:.1f}, bright">'
        f'<defs><linearGradient id="scale-colors">{stops}</linearGradient></defs>'
        f'<rect width="{SIDE}" height="16" rx="2" fill="url(#scale-colors)"/>'
        f'<text x="0" y="34">{low:.1f}</text>'
        f'<text x="{SIDE}" y="34" text-anchor="end">{high:.1f}</text></svg>'
    )


def scale_color(share: float) -> str:
    """Color at a share of the scale, 0 low and 1 high; beyond the ends, that of the end."""
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    first = min(int(place), len(SCALE) - 2)
    pairs = zip(SCALE[first], SCALE[first + 1], strict=True)
    return hex_color([round(a + (b - a) * (place - first)) for a, b in pairs])


def hex_color(rgb: Any) -> str:
    """`#rrggbb`."""
    red, green, blue = (int(part) for part in rgb)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _verdict(x: float, y: float, grid: CellGrid, index: int) -> str:
    """The likeliest class over the logit, on a plate that keeps them readable over any color."""
    return (
        f'<rect class="plate" x="{x - 21:g}" y="{y - 20:g}" width="42" height="40" rx="6"/>'
        f'<text class="verdict" x="{x:g}" y="{y - 1:g}" text-anchor="middle">'
        f"{grid.top[index]}</text>"
        f'<text class="logit" x="{x:g}" y="{y + 14:g}" text-anchor="middle">'
        f"{grid.label_logit[index]:.1f}</text>"
    )


def _image(label: str, parts: list[str]) -> str:
    return (
        f'<svg class="map" viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{escape(label)}">'
        f'<use href="#{VIEW_ID}" width="{SIDE}" height="{SIDE}"/>{"".join(parts)}</svg>'
    )
