"""The sections of the report that show what was measured, each a pure function of the result."""

from __future__ import annotations

from html import escape

from cache_service.human_format import human_bytes
from cli.experiments.demo import table as text
from cli.experiments.demo.result import DemoResult
from cli.experiments.demo.settings import CACHED_KD, LIVE
from cli.experiments.svg import LineChart, Series, bar_chart, line_chart, swatch

TIMES = "\N{MULTIPLICATION SIGN}"


def opening(result: DemoResult) -> str:
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
        "<h1>One teacher, recorded once</h1>\n"
        f'<p class="lead">A teacher of {result.teacher.num_parameters:,} weights learned to read '
        "scikit-learn's handwritten digits. What it says about every augmented view was recorded. "
        f"Then one student of {result.student_parameters:,} weights was trained four ways on those "
        "same views: alone, with the teacher beside it, and twice from the recording, with no "
        f'teacher in memory.</p>\n<ul class="facts">{items}</ul>'
    )


def table(result: DemoResult) -> str:
    """The table, as on the terminal."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in text.COLUMNS)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in text.cells(result)
    )
    return (
        '<div class="wide" role="region" aria-labelledby="table" tabindex="0">\n'
        f"<table>\n<caption>{escape(text.caption(result))}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>\n"
        f"<p>{escape(text.costs(result))}</p>"
    )


def accuracy(result: DemoResult) -> str:
    """Curves over epochs."""
    series = [
        Series(row.way.title, row.measured.curve, style) for style, row in enumerate(result.rows)
    ]
    told = "; ".join(f"{row[0]} ends at {row[1]}" for row in text.cells(result))
    chart = LineChart(
        label=f"Test accuracy after each epoch. {told}.",
        x_name="epochs",
        y_name="right on the test images",
        first_x=1,
        low=0.0,
        high=1.0,
        show="{:.0%}".format,
        reference=("the teacher", result.teacher.accuracy),
    )
    legend = "".join(f"<li>{swatch(s)}{escape(s.label)}</li>" for s in series)
    return (
        f"<figure>\n{line_chart(chart, series)}\n"
        f'<figcaption><ul class="legend">{legend}</ul></figcaption>\n</figure>\n'
        f'<p class="soft">{result.settings.epochs} epochs are few, on purpose. Digits are easy: in '
        "ten, this student gets to 98 % with a teacher or without. One run each, so differences of "
        "a point or two are chance; what the cache promises is in the losses below.</p>"
    )


def costs(result: DemoResult) -> str:
    """Bars of time and memory."""
    times = [
        Series(row.way.title, (row.measured.seconds_per_step,), style)
        for style, row in enumerate(result.rows)
    ]
    sizes = [
        Series(row.way.title, (float(row.measured.peak_memory_bytes),), style)
        for style, row in enumerate(result.rows)
    ]
    told = text.cells(result)
    time_label = "; ".join(f"{row[0]} {row[2]}" for row in told)
    size_label = "; ".join(f"{row[0]} {row[3]}" for row in told)
    return (
        '<div class="figures">\n<figure>\n'
        f"{bar_chart(f'Time per step. {time_label}.', times, text.milliseconds)}\n"
        "<figcaption><strong>Time per step</strong>, median</figcaption>\n</figure>\n<figure>\n"
        f"{bar_chart(f'Peak memory. {size_label}.', sizes, human_bytes)}\n"
        "<figcaption><strong>Peak memory</strong> above the start of the run</figcaption>\n"
        "</figure>\n</div>"
    )


def losses(result: DemoResult) -> str:
    """Losses of the live and the cached run, one on the other."""
    top = max(*result.live_losses, *result.cached_losses) * 1.05
    chart = LineChart(
        label="Loss at each step of the two trainings by KD: live and cached run together.",
        x_name="steps",
        y_name="loss, nats",
        first_x=1,
        low=0.0,
        high=top,
        show="{:g}".format,
    )
    series = [
        Series(CACHED_KD.title, result.cached_losses, 2),
        Series(LIVE.title, result.live_losses, 1),
    ]
    legend = "".join(f"<li>{swatch(s)}{escape(s.label)}</li>" for s in series)
    return (
        f"<p>{escape(text.same_losses(result))}</p>\n"
        "<p>Below are the two whole trainings. They start together and then drift apart a little, "
        "as any two trainings do that differ in the last bit of a number.</p>\n"
        f"<figure>\n{line_chart(chart, series)}\n"
        f'<figcaption><ul class="legend">{legend}</ul></figcaption>\n</figure>'
    )
