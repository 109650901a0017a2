"""A view and the teacher's answers to its cells, as SVG text: pure functions of numbers.

The drawing of a map is the service's, whose explorer shows the same; here is what the report adds.

Shape letters: H W pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache_service.api.page import drawing
from cache_service.api.page.drawing import SIDE, Cell, hex_color
from cli.experiments.demo.result import CellGrid

VIEW_ID = "the-view"
"""Name of the one drawing of the pixels, which every map lies on."""

Pixels = NDArray[np.uint8]

_UNDER = f'<use href="#{VIEW_ID}" width="{SIDE}" height="{SIDE}"/>'


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
    return drawing.drawing("map", label, _UNDER)


def cell_map(grid: CellGrid, *, label: str, low: float, high: float) -> str:
    """One scale: each cell has the color of its logit of the label's class, and its prediction.

    Args:
        grid: the cells.
        label: what a screen reader says.
        low, high: logits at the ends of the color scale, the same for every scale of a view.
    """
    rows = zip(grid.top, grid.label_logit, grid.complementary, strict=True)
    cells = [
        Cell(
            fraction=(logit - low) / (high - low) if high > low else 0.5,
            prediction=str(top),
            value=f"{logit:.1f}",
            complementary=odd,
            description=f"{top}, logit {logit:.1f}, {'complementary' if odd else 'consistent'}",
        )
        for top, logit, odd in rows
    ]
    return drawing.cell_map(grid.scale, cells, under=_UNDER, label=label)


def scale_bar(low: float, high: float) -> str:
    """The color scale with the logits at its ends."""
    said = f"Color scale from a logit of {low:.1f}, dark, to {high:.1f}, bright"
    return drawing.scale_bar(f"{low:.1f}", f"{high:.1f}", said)
