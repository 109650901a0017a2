"""The demo's table in the terminal, and its report: one HTML file that needs nothing else.

Every function is a pure function of the result. Shape letters: H W pixels.
"""

from __future__ import annotations

import shlex
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from cache_service.api.page import drawing
from cache_service.api.page.drawing import SIDE, Cell, hex_color
from cache_service.human_format import human_bytes, human_seconds
from cache_service.storage.local import LocalStorage
from cli.experiments.demo.run import BUILD, CACHED_KD, LIVE, DemoResult
from cli.experiments.demo.sample_view import CellGrid, SampleView
from cli.experiments.html_report import (
    Section,
    definition_list,
    figure,
    html_table,
    legend,
    render_page,
)
from cli.experiments.svg import LineChart, Series, bar_chart, line_chart

REPORT_NAME = "report.html"
COLUMNS = ("Student", "Test accuracy", "Per step", "Peak memory")
TIMES = "\N{MULTIPLICATION SIGN}"

VIEW_ID = "the-view"
"""Name of the one drawing of the view's pixels, which every map lies on."""

EACH_STUDENT = (
    "Each student was trained in a fresh process, one after the other, on the same views in the "
    "same order, from the same initial weights."
)
A_STEP = (
    "A step is everything from fetching a batch to the updated weights: rendering the views, "
    "reading and checking rows, the networks, the gradient. Evaluating and saving lie outside."
)

_UNDER = f'<use href="#{VIEW_ID}" width="{SIDE}" height="{SIDE}"/>'


def write_report(result: DemoResult) -> str:
    """Write the report into the demo's folder. Returns its path."""
    storage = LocalStorage(result.out)
    storage.put(REPORT_NAME, render_report(result).encode())
    storage.sweep()
    return str(Path(result.out) / REPORT_NAME)


def cells(result: DemoResult) -> list[tuple[str, str, str, str]]:
    """The table's rows as text."""
    return [
        (
            row.title,
            f"{row.measured.accuracy:.1%}",
            milliseconds(row.measured.seconds_per_step),
            human_bytes(row.measured.peak_memory_bytes),
        )
        for row in result.rows
    ]


def terminal_table(result: DemoResult) -> Table:
    """The table for a terminal."""
    table = Table()
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == COLUMNS[0] else "right", no_wrap=True)
    for row in cells(result):
        table.add_row(*row)
    return table


def caption(result: DemoResult) -> str:
    """What the table is of."""
    return (
        f"One student, {result.config.train['epochs']} epochs on the same views, four ways "
        f"(its teacher: {result.teacher.accuracy:.1%})"
    )


def describe_costs(result: DemoResult) -> str:
    """What the live teacher cost, and what recording it cost."""
    live, cached = result.measured(LIVE), result.measured(CACHED_KD)
    slower = live.seconds_per_step / cached.seconds_per_step
    larger = live.peak_memory_bytes / max(cached.peak_memory_bytes, 1)
    text = (
        f"With the live teacher a step took {slower:.1f} times as long and {larger:.1f} times the "
        "memory of one from the cache."
    )
    seconds = result.recording.seconds
    if seconds is None:
        return text
    steps = len(result.live_losses)
    saved = (live.seconds_per_step - cached.seconds_per_step) * steps
    recorded = f"{text} Recording took {human_seconds(seconds)}, once"
    if saved <= 0:
        return f"{recorded}."
    return f"{recorded}; from it, a run like these is {human_seconds(saved)} shorter."


def describe_agreement(result: DemoResult) -> str:
    """How far the losses with the live teacher and from the cache are apart."""
    agreement = result.agreement
    outcome = "within" if agreement.holds else "NOT within"
    return (
        f"From the same weights, the loss with the live teacher and the loss from the cache differ "
        f"by at most {agreement.max_abs_difference:.2g} nats at {len(agreement.live)} steps, "
        f"{outcome} the {agreement.tolerance:g} that rounding to float16 allows."
    )


def milliseconds(seconds: float) -> str:
    """`0.0213` -> `21.3 ms`."""
    return f"{seconds * 1000:.1f} ms"


def render_report(result: DemoResult) -> str:
    """The whole report."""
    costs = describe_costs(result)
    table = html_table(COLUMNS, cells(result), caption=caption(result), name="table")
    sections = (
        Section("table", "Four ways, one table", f"{table}\n<p>{escape(costs)}</p>"),
        Section("accuracy", "Accuracy, epoch by epoch", _accuracy(result)),
        Section("costs", "What a step costs", _costs(result)),
        Section("losses", "The same losses", _losses(result)),
        Section("cells", "What the teacher predicts for one view", _one_view(result.sample)),
        Section("cache", "What the cache holds", _cache(result)),
        Section("again", "Run it again", _again(result)),
        Section("how", "How this was measured", _method(result)),
    )
    return render_page(
        "kd-cache demo: one teacher, recorded once",
        _opening(result),
        sections,
        definitions=view_symbol(result.sample.pixels_HW3),
    )


def _opening(result: DemoResult) -> str:
    """What happened, and the three numbers that matter."""
    live, cached = result.measured(LIVE), result.measured(CACHED_KD)
    slower = live.seconds_per_step / cached.seconds_per_step
    facts = (
        (f"{slower:.1f}{TIMES}", "time per step with the teacher running beside the student"),
        (
            human_bytes(live.peak_memory_bytes - cached.peak_memory_bytes),
            "more memory at the peak, for the same student",
        ),
        (
            f"{result.agreement.max_abs_difference:.1g}",
            "nats between their losses at most, from the same weights",
        ),
    )
    items = "".join(f"<li><strong>{escape(a)}</strong> {escape(b)}</li>" for a, b in facts)
    return (
        f"<h1>{escape(result.config.title)}</h1>\n"
        f'<p class="lead">A teacher of {result.teacher.num_parameters:,} weights learned to read '
        "scikit-learn's handwritten digits. Its logits for every augmented view were recorded. "
        f"Then one student of {result.student_parameters:,} weights was trained four ways on those "
        "same views: alone, with the teacher beside it, and twice from the recording, with no "
        f'teacher in memory.</p>\n<ul class="facts">{items}</ul>'
    )


def _accuracy(result: DemoResult) -> str:
    series = [Series(row.title, row.measured.curve, i) for i, row in enumerate(result.rows)]
    ends = "; ".join(f"{row[0]} ends at {row[1]}" for row in cells(result))
    chart = LineChart(
        label=f"Test accuracy after each epoch. {ends}.",
        x_name="epochs",
        y_name="test accuracy",
        first_x=1,
        low=0.0,
        high=1.0,
        show="{:.0%}".format,
        reference=("the teacher", result.teacher.accuracy),
    )
    return (
        f"{figure(line_chart(chart, series), legend(series))}\n"
        f'<p class="soft">{result.config.train["epochs"]} epochs are few, on purpose. Digits are '
        "easy: in ten, this student gets to 98 % with a teacher or without. These are single runs, "
        "so differences of a point or two are chance; what the cache guarantees is shown by the "
        "losses below.</p>"
    )


def _costs(result: DemoResult) -> str:
    texts = cells(result)
    charts = []
    for name, column, values, show, note in (
        (
            "Time per step",
            2,
            [row.measured.seconds_per_step for row in result.rows],
            milliseconds,
            ", median",
        ),
        (
            "Peak memory",
            3,
            [float(row.measured.peak_memory_bytes) for row in result.rows],
            human_bytes,
            " above the start of the run",
        ),
    ):
        bars = [
            Series(row.title, (value,), style)
            for style, (row, value) in enumerate(zip(result.rows, values, strict=True))
        ]
        label = f"{name}. {'; '.join(f'{row[0]} {row[column]}' for row in texts)}."
        charts.append(figure(bar_chart(label, bars, show), f"<strong>{name}</strong>{note}"))
    return '<div class="figures">\n' + "\n".join(charts) + "\n</div>"


def _losses(result: DemoResult) -> str:
    """Losses of the live and the cached run, one on the other."""
    chart = LineChart(
        label="Loss at each step of the two trainings by KD: live and cached run together.",
        x_name="steps",
        y_name="loss, nats",
        first_x=1,
        low=0.0,
        high=max(*result.live_losses, *result.cached_losses) * 1.05,
        show="{:g}".format,
    )
    series = [
        Series(result.config.title_of(CACHED_KD), result.cached_losses, 2),
        Series(result.config.title_of(LIVE), result.live_losses, 1),
    ]
    return (
        f"<p>{escape(describe_agreement(result))}</p>\n"
        "<p>Below are the two whole trainings. They start together and then drift apart a little, "
        "as any two trainings do that differ in the last bit of a number.</p>\n"
        f"{figure(line_chart(chart, series), legend(series))}"
    )


def view_symbol(pixels_HW3: NDArray[np.uint8]) -> str:
    """The pixels, drawn once, out of sight; the maps refer to them."""
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


def grid_map(grid: CellGrid, *, label: str, low: float, high: float) -> str:
    """One scale: each cell tinted by its logit of the label's class, with its prediction on it.

    Args:
        grid: the cells.
        label: what a screen reader says.
        low, high: logits at the ends of the color scale, the same for every scale of a view.
    """
    rows = zip(grid.top, grid.label_logit, grid.complementary, strict=True)
    parts = [
        Cell(
            fraction=(logit - low) / (high - low) if high > low else 0.5,
            mark=str(top),
            value=f"{logit:.1f}",
            complementary=is_complementary,
            description=f"{top}, logit {logit:.1f}, {_kind(is_complementary)}",
        )
        for top, logit, is_complementary in rows
    ]
    return drawing.cell_map(grid.scale, parts, under=_UNDER, label=label)


def scale_bar(low: float, high: float) -> str:
    """The color scale with the logits at its ends."""
    label = f"Color scale from a logit of {low:.1f}, dark, to {high:.1f}, bright"
    return drawing.scale_bar(f"{low:.1f}", f"{high:.1f}", label)


def _kind(is_complementary: bool) -> str:
    return "complementary" if is_complementary else "consistent"


def _one_view(sample: SampleView) -> str:
    """A view, its likeliest classes, and its cells at every scale."""
    logits = [logit for grid in sample.grids for logit in grid.label_logit]
    low, high = min(logits), max(logits)
    name = sample.classes[sample.label]
    likeliest = ", ".join(
        f"{escape(sample.classes[index])} ({probability:.1%}, logit {logit:.1f})"
        for index, logit, probability in sample.likeliest
    )
    maps = "\n".join(
        figure(
            grid_map(grid, label=_describe_grid(grid, sample), low=low, high=high),
            f"<strong>Scale {grid.scale}</strong>: {_count_complementary(grid)}",
        )
        for grid in sample.grids
    )
    view = figure(
        drawing.drawing("map", f"Pixels of the view: a handwritten {name}", _UNDER),
        f"<strong>The view</strong>, {sample.pixels_HW3.shape[0]} px",
    )
    return (
        f"<p>Sample {sample.sample} is a {escape(name)}. This is its view at position "
        f"{sample.position} of seed {sample.seed}, rendered anew and equal to the recorded digest. "
        f"For the whole of it the teacher predicts {likeliest}. Each cell shows the prediction for "
        f"it and, below and as the tint, the logit of {escape(name)}.</p>\n"
        "<p>A cell is <strong>complementary</strong> (thick dashed frame) if exactly one of the "
        "predictions for the cell and for the whole image is the label; SD-KD counts it double. "
        "The others are <strong>consistent</strong> (thin frame).</p>\n"
        f"{figure(scale_bar(low, high), f'Logit of {escape(name)}')}\n"
        f'<div class="maps">\n{view}\n{maps}\n</div>'
    )


def _count_complementary(grid: CellGrid) -> str:
    marked, total = sum(grid.complementary), len(grid.complementary)
    return "the whole image" if total == 1 else f"{marked} of {total} cells complementary"


def _describe_grid(grid: CellGrid, sample: SampleView) -> str:
    """The map in words: every cell's prediction, logit and kind."""
    described = "; ".join(
        f"row {index // grid.scale + 1} column {index % grid.scale + 1}: "
        f"{sample.classes[top]}, logit {logit:.1f}, {_kind(is_complementary)}"
        for index, (top, logit, is_complementary) in enumerate(
            zip(grid.top, grid.label_logit, grid.complementary, strict=True)
        )
    )
    return f"Cells of scale {grid.scale}. {described}."


def _cache(result: DemoResult) -> str:
    """What was recorded, and how large it is."""
    recording = result.recording
    scales = ", ".join(map(str, recording.scales))
    if recording.stored_scales != recording.scales:
        (finest,) = recording.stored_scales
        scales += f"; stored is the {finest} x {finest} grid, whose means are the coarser cells"
    logits = f"{recording.bytes_per_view:,} bytes: float16 logits, sample number, digests"
    return definition_list(
        (
            ("Where", recording.url),
            ("Views", f"{recording.views:,}: seeds {recording.seeds} of the training images"),
            ("Scales", scales),
            ("A view takes", logits),
            ("All files", human_bytes(recording.stored_bytes)),
            ("Recorded in", human_seconds(recording.seconds)),
            ("Fingerprint", recording.fingerprint),
        )
    )


def _again(result: DemoResult) -> str:
    """Commands and files."""
    out = Path(result.out)

    def path(name: str) -> str:
        return shlex.quote(str(out / name))

    commands = (
        (
            f"kd-cache build {path(f'{BUILD}.yaml')}",
            "finds every view recorded: nothing left to do",
        ),
        (
            f"kd-cache verify {path('cache')} --recompute 64",
            "checks every byte, and runs the teacher on 64 views again",
        ),
        (f"kd-cache train {path('kd.yaml')} --set out={path('kd-again')}", "the same run again"),
        (f"kd-cache evaluate {path('sd-kd')}", "scores a trained student"),
    )
    lines = "\n".join(f"{escape(command)}\n  # {note}" for command, note in commands)
    files = "\n".join(
        f"<details>\n<summary><code>{escape(str(out / name))}</code></summary>\n"
        f'<pre tabindex="0">{escape(content)}</pre>\n</details>'
        for name, content in result.files.items()
    )
    return (
        "<p>From the folder in which the demo was run:</p>\n"
        f'<pre tabindex="0">{lines}</pre>\n<p>The files it ran, as it wrote them:</p>\n{files}'
    )


def _method(result: DemoResult) -> str:
    """How the numbers were measured."""
    memory = (
        "what torch had allocated on the GPU"
        if result.device == "cuda"
        else "resident memory of the process above what it was before the run began, with all "
        "libraries loaded"
    )
    batch_size = result.config.train["batch_size"]
    items = (
        f"Device: {result.device}, 1 thread. Batches of {batch_size}.",
        EACH_STUDENT,
        A_STEP,
        f"Peak memory is {memory}.",
        "The live teacher computes logits of whole images only, the least that KD needs.",
        "Accuracy is that of the last epoch, on test images that no network was trained on.",
    )
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
