"""The report of an experiment: one HTML file that needs nothing else and runs nothing.

Its content security policy allows one style sheet, by digest; no script, no image, no font.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import NamedTuple

from cache_service.config import dump_yaml
from cli.experiments.result_table import (
    FIGURES,
    OUTCOMES,
    Row,
    Table,
    describe_figures,
    figure_cells,
    time_cells,
)
from cli.experiments.svg import (
    NUM_STYLES,
    Dots,
    LineChart,
    Series,
    dot_chart,
    line_chart,
    swatch,
)

ROWS_PER_CHART = 8
"""More rows than that are drawn in several charts."""


class Section(NamedTuple):
    """A section of a report; `content` is HTML."""

    name: str
    heading: str
    content: str


class Curve(NamedTuple):
    """Test accuracy over the epochs of a run: `values` after so many `epochs`."""

    epochs: tuple[float, ...]
    values: tuple[float, ...]


def render_page(
    title: str, opening: str, sections: Iterable[Section], *, definitions: str = ""
) -> str:
    """A whole page.

    Args:
        title: of the window.
        opening: HTML above the sections.
        sections: in order.
        definitions: hidden SVG that the sections refer to.
    """
    style = resources.files("cli.experiments").joinpath("report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    body = "\n".join(
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(heading)}</h2>\n{content}\n'
        "</section>"
        for name, heading, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{definitions}\n<main>\n{opening}\n{body}\n</main>\n</body>\n</html>\n"
    )


def render_experiment(table: Table, curves: Mapping[str, Curve]) -> str:
    """The report of a table.

    Args:
        table: what was measured.
        curves: test accuracy over epochs, by the name of a row.
    """
    source = "" if table.source is None else f'<p class="soft">Source: {escape(table.source)}</p>'
    quick = "<p>Quick form: these figures are not the full form's.</p>" if table.quick else ""
    opening = (
        f"<h1>{escape(table.title)}</h1>\n{source}\n{quick}\n"
        f"<p>Made by <code>{escape(table.command)}</code>.</p>"
    )
    sections = [Section("figures", "Figures", _figures(table))]
    if table.goals:
        sections.append(Section("goals", "What was to be shown", _goals(table)))
    sections.append(Section("comparison", "Comparison", _comparison(table)))
    if curves:
        sections.append(Section("epochs", "Test accuracy, epoch by epoch", _curves(curves)))
    if table.notes:
        notes = "\n".join(f"<p>{escape(note)}</p>" for note in table.notes)
        sections.append(Section("notes", "Notes", notes))
    sections.append(Section("how", "How this was measured", _method(table)))
    return render_page(table.title, opening, sections)


def html_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, name: str
) -> str:
    """A table that scrolls inside its own region; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in header)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="wide" role="region" aria-labelledby="{name}" tabindex="0">\n'
        f"<table>\n<caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def figure(drawing: str, caption: str) -> str:
    """A drawing with its caption, which is HTML."""
    return f"<figure>\n{drawing}\n<figcaption>{caption}</figcaption>\n</figure>"


def legend(series: Iterable[Series]) -> str:
    """The names of the lines of a chart."""
    items = "".join(f"<li>{swatch(line)}{escape(line.label)}</li>" for line in series)
    return f'<ul class="legend">{items}</ul>'


def definition_list(items: Iterable[tuple[str, str]]) -> str:
    """Names with their values."""
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in items) + "</dl>"


def _figures(table: Table) -> str:
    header, rows = figure_cells(table)
    plain = [[cell.replace("**", "") for cell in row] for row in rows]
    return html_table(header, plain, caption=describe_figures(table), name="figures")


def _goals(table: Table) -> str:
    rows = [
        (goal.text, goal.measured, OUTCOMES[goal.met].replace("**", "")) for goal in table.goals
    ]
    return html_table(("wanted", "measured", ""), rows, caption="", name="goals")


def _comparison(table: Table) -> str:
    charts = []
    for start in range(0, len(table.rows), ROWS_PER_CHART):
        rows = [_dots(row) for row in table.rows[start : start + ROWS_PER_CHART]]
        label = "; ".join(
            f"{row.label}: " + ("failed" if row.mean is None else f"{row.mean:.2f}") for row in rows
        )
        charts.append(dot_chart(f"Mean over runs. {label}.", rows, "{:g}".format))
    caption = (
        f"{FIGURES[table.unit].capitalize()}. A dot is a run, a bar is the mean of a row with one "
        "standard deviation to both sides, a dashed box is the published figure."
    )
    return figure("\n".join(charts), escape(caption))


def _dots(row: Row) -> Dots:
    published = row.published
    if published is not None and not isinstance(published, tuple):
        published = (published, published)
    return Dots(row.what, tuple(row.values), row.mean, row.standard_deviation, published)


def _curves(curves: Mapping[str, Curve]) -> str:
    named = [
        Series(name, curve.values, index % NUM_STYLES, curve.epochs)
        for index, (name, curve) in enumerate(curves.items())
    ]
    parts = []
    for start in range(0, len(named), ROWS_PER_CHART):
        series = named[start : start + ROWS_PER_CHART]
        values = [value for line in series for value in line.values]
        ends = "; ".join(f"{line.label} ends at {line.values[-1]:.1%}" for line in series)
        chart = LineChart(
            label=f"Test accuracy after each epoch. {ends}.",
            x_name="epochs",
            y_name="test accuracy",
            first_x=int(min(x for line in series for x in line.x or (1,))),
            low=min(values) - 0.02,
            high=max(values) + 0.02,
            show="{:.0%}".format,
        )
        parts.append(figure(line_chart(chart, series), legend(series)))
    return '<div class="figures">\n' + "\n".join(parts) + "\n</div>"


def _method(table: Table) -> str:
    machine = [(name, str(value)) for name, value in (table.machine | table.versions).items()]
    times = [(f"time, {part}", spent) for part, spent in time_cells(table)]
    settings = dump_yaml(table.settings)
    failures = [
        f"{row.what}, seed {run.seed}: {run.failure}"
        for row in table.rows
        for run in row.runs
        if run.failure is not None
    ]
    failed = "".join(f"<li>{escape(each)}</li>" for each in failures)
    return (
        (f"<p>Runs that failed:</p>\n<ul>{failed}</ul>\n" if failed else "")
        + definition_list([*machine, *times])
        + "\n<details>\n<summary>Settings</summary>\n"
        f'<pre tabindex="0">{escape(settings)}</pre>\n</details>'
    )
