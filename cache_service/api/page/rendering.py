"""Values -> HTML. Templates escape what they are given; only drawings made here pass unescaped."""

from __future__ import annotations

from html import escape

import jinja2
from markupsafe import Markup

from cache_service.api.page.answer import CellAnswer, Grid
from cache_service.api.page.cell_map import SIDE, Cell, cell_map, drawing, scale_bar
from cache_service.api.page.coverage import Coverage, coverage_picture
from cache_service.api.page.explorer import Explored
from cache_service.human_format import human_bytes, human_seconds

VIEW_ID = "the-view"
"""Name of the one copy of the view's pixels, on which every map lies."""


def make_environment() -> jinja2.Environment:
    """The templates of this package, with what they may call."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cache_service.api.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=human_bytes,
        seconds=human_seconds,
        count=count,
        share=share,
        latency=latency,
        prose=prose,
        coverage=draw_coverage,
        coverage_words=coverage_words,
        coverage_scale=coverage_scale,
    )
    environment.globals.update(
        view_symbol=view_symbol,
        view_drawing=view_drawing,
        grid_drawing=grid_drawing,
        share_scale=share_scale,
    )
    return environment


def count(number: float) -> str:
    """`1234567` -> `1,234,567`."""
    return f"{number:,.0f}"


def share(part: float) -> str:
    """Probabilities and progress: whole percent, but neither 0 nor 100 % for what is only near."""
    percent = 100 * part
    if 0 < percent < 1:
        return "<1%"
    if 99 < percent < 100:
        return ">99%"
    return f"{percent:.0f}%"


def latency(seconds: float | None) -> str:
    """Milliseconds up to a second."""
    if seconds is None:
        return "\N{EN DASH}"
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.1f} s"


def prose(text: str) -> Markup:
    """A message with what stands in backticks as code."""
    parts = escape(text).split("`")
    if len(parts) % 2 == 0:  # a lone backtick is a character like others
        return _safe("`".join(parts))
    marked = [f"<code>{part}</code>" if nth % 2 else part for nth, part in enumerate(parts)]
    return _safe("".join(marked))


def coverage_words(found: Coverage) -> str:
    """What is recorded, in one sentence."""
    return (
        f"{found.complete:,} of {found.num_seeds:,} seeds complete, "
        f"{found.recorded:,} of {found.planned:,} shards recorded"
    )


def coverage_scale(found: Coverage) -> str:
    """What the rows and the boxes of the picture stand for."""
    last = found.first_seed + found.num_seeds - 1
    seeds = f"seed {last}" if found.num_seeds == 1 else f"seeds {found.first_seed} to {last}"
    shards = "1 shard" if found.num_shards == 1 else f"{found.num_shards:,} shards"
    down = _axis("Down", seeds, found.seeds_per_row)
    return f"{down}; {_axis('across', shards, found.shards_per_box)}"


def draw_coverage(found: Coverage) -> Markup:
    """The picture of seeds x shards."""
    return _safe(coverage_picture(found, escape(coverage_words(found) + ".")))


def view_symbol(view: str) -> Markup:
    """The view's pixels, drawn once, out of sight."""
    if not view:
        return Markup()
    return _safe(
        '<svg class="hidden" aria-hidden="true" width="0" height="0"><defs>'
        f'<symbol id="{VIEW_ID}" viewBox="0 0 {SIDE} {SIDE}"><image class="pixels" '
        f'width="{SIDE}" height="{SIDE}" preserveAspectRatio="none" href="{escape(view)}"/>'
        "</symbol></defs></svg>"
    )


def view_drawing(explored: Explored) -> Markup:
    """The view alone."""
    row = explored.row
    return _safe(
        drawing("map", f"View of sample {row.sample} under seed {row.seed}", _under(explored))
    )


def grid_drawing(explored: Explored, grid: Grid) -> Markup:
    """The answers to the cells of one scale, over the view."""
    cells = [
        Cell(
            share=cell.target_share,
            verdict=explored.short_name(cell.top),
            value=share(cell.target_share),
            complementary=cell.complementary,
            told=cell_words(explored, cell),
        )
        for cell in grid.cells
    ]
    told = "; ".join(cell.told for cell in cells)
    label = f"Cells of scale {grid.scale}. {told}."
    return _safe(cell_map(grid.scale, cells, under=_under(explored), label=label))


def cell_words(explored: Explored, cell: CellAnswer) -> str:
    """A cell in words."""
    kinds = {True: ", complementary", False: ", consistent", None: ""}
    target = explored.name(explored.answer.target)
    return (
        f"row {cell.row + 1} column {cell.column + 1}: {explored.name(cell.top)}, "
        f"{target} {share(cell.target_share)}{kinds[cell.complementary]}"
    )


def share_scale(name: str) -> Markup:
    """The color scale of the maps."""
    said = f"Color scale: probability of {name} from 0, dark, to 100 percent, bright"
    return _safe(scale_bar("0%", "100%", said))


def _axis(direction: str, what: str, per_box: float) -> str:
    shared = f", about {per_box:.3g} each" if per_box > 1 else ""
    return f"{direction}: {what}{shared}"


def _under(explored: Explored) -> str:
    if explored.view:
        return f'<use href="#{VIEW_ID}" width="{SIDE}" height="{SIDE}"/>'
    return f'<rect class="blank" width="{SIDE}" height="{SIDE}"/>'


def _safe(html: str) -> Markup:
    return Markup(html)  # noqa: S704  whoever calls this has escaped every name
