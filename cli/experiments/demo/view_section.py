"""The section of the report that looks at one view and its cells."""

from __future__ import annotations

from html import escape

from cli.experiments.demo.heatmap import cell_map, scale_bar, view_image
from cli.experiments.demo.result import CellGrid, DemoResult, SampleView


def one_view(result: DemoResult) -> str:
    """A view, its likeliest classes, and its cells at every scale."""
    sample = result.sample
    logits = [logit for grid in sample.grids for logit in grid.label_logit]
    low, high = min(logits), max(logits)
    name = sample.classes[sample.label]
    maps = "\n".join(
        f"<figure>\n{cell_map(grid, label=_describe(grid, sample), low=low, high=high)}\n"
        f"<figcaption><strong>Scale {grid.scale}</strong>: {_count(grid)}</figcaption>\n</figure>"
        for grid in sample.grids
    )
    seen = f"Pixels of the view: a handwritten {name}"
    return (
        f"<p>Sample {sample.sample} is a {escape(name)}. This is its view at position "
        f"{sample.position} of seed {sample.seed}, rendered anew and equal to the recorded digest. "
        f"Of the whole of it the teacher says {_likeliest(sample)}. Each cell shows its verdict "
        f"and, below it and as the tint, the logit of {escape(name)}.</p>\n"
        "<p>A cell is <strong>complementary</strong> (thick dashed frame) where exactly one of "
        "the verdicts on the cell and on the whole image names the label; SD-KD counts it double. "
        "The others are <strong>consistent</strong> (thin frame).</p>\n"
        f"<figure>\n{scale_bar(low, high)}\n<figcaption>Logit of {escape(name)}</figcaption>\n"
        "</figure>\n"
        f'<div class="maps">\n<figure>\n{view_image(seen)}\n<figcaption><strong>The view'
        f"</strong>, {sample.pixels_HW3.shape[0]} px</figcaption>\n</figure>\n{maps}\n</div>"
    )


def _likeliest(sample: SampleView) -> str:
    return ", ".join(
        f"{escape(sample.classes[index])} ({share:.1%}, logit {logit:.1f})"
        for index, logit, share in sample.likeliest
    )


def _count(grid: CellGrid) -> str:
    marked, every = sum(grid.complementary), len(grid.complementary)
    if every == 1:
        return "the whole image"
    return f"{marked} of {every} cells complementary"


def _describe(grid: CellGrid, sample: SampleView) -> str:
    """The map in words: every cell's verdict, logit and kind."""
    cells = "; ".join(
        f"row {index // grid.scale + 1} column {index % grid.scale + 1}: "
        f"{sample.classes[top]}, logit {logit:.1f}, {'complementary' if marked else 'consistent'}"
        for index, (top, logit, marked) in enumerate(
            zip(grid.top, grid.label_logit, grid.complementary, strict=True)
        )
    )
    return f"Cells of scale {grid.scale}. {cells}."
