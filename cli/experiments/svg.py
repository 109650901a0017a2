"""Plots as SVG text: pure functions of numbers. Colors come from classes of the page's style sheet.

A chart is 480 units wide and is shown at 300 to 600 px, so that its text stays readable on a phone.
Every chart is one image to a screen reader, which reads its label; series differ in dash and marker
as well as in color.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH = 480
LINE_HEIGHT = 300
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 34, 46
"""Margins of a line chart: room for tick labels and the names of the axes."""

BAR_ROW, BAR_THICKNESS = 52, 16
"""A bar chart's row: the name above, the bar below."""

VALUE_ROOM = 92
"""Room right of the longest bar for its value."""

MARKER = 4.5
"""Half the size of a marker."""

LEGEND_ROW = 22
"""Height of a line of a legend below a chart."""

MAX_MARKED = 12
"""Points beyond which markers would hide the line."""


NUM_STYLES = 8
"""Styles of the page's style sheet; a chart of more series repeats them."""


class Series(NamedTuple):
    """One line, or one bar where it has one value.

    Attributes:
        label: in the legend.
        values: of y.
        style: chooses color, dash and marker.
        x: where the values are; 1 apart from the chart's `first_x` if not given.
    """

    label: str
    values: tuple[float, ...]
    style: int
    x: tuple[float, ...] | None = None


class Dots(NamedTuple):
    """One row of a dot chart: the values of several runs, their mean, and a reference.

    Attributes:
        label: above the row.
        values: one dot each.
        mean: a bar across the row; None where there is no value.
        deviation: half the length of the whisker around the mean.
        reference: ends of a range that is drawn hollow; equal ends are one point.
    """

    label: str
    values: tuple[float, ...]
    mean: float | None
    deviation: float | None = None
    reference: tuple[float, float] | None = None


class LineChart(NamedTuple):
    """What a line chart shows besides its series.

    Attributes:
        label: what a screen reader says.
        x_name, y_name: of the axes.
        first_x: x of the first value; the next ones are 1 apart.
        low, high: ends of the y axis.
        show: how a value of y is written.
        reference: a horizontal line with its name.
        show_x: how a value of x is written.
    """

    label: str
    x_name: str
    y_name: str
    first_x: int
    low: float
    high: float
    show: Callable[[float], str]
    reference: tuple[str, float] | None = None
    show_x: Callable[[float], str] = "{:.0f}".format


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within [low, high], at most `most` of them, in steps of 1, 2 or 5."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    while (high - low) / step > most - 1:
        # 1 -> 2 -> 5 -> 10
        leading = round(step / 10 ** math.floor(math.log10(step * 1.001)))
        step *= 2.5 if leading == 2 else 2
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def line_chart(chart: LineChart, series: Sequence[Series]) -> str:
    """Lines over x."""
    return _image(chart.label, LINE_HEIGHT, _line_parts(chart, series))


def line_picture(charts: Sequence[tuple[LineChart, Sequence[Series]]], style_sheet: str) -> str:
    """Charts of lines side by side, with the legend of the first, as an SVG file of its own."""
    height = LINE_HEIGHT + LEGEND_ROW * len(charts[0][1])
    parts = [f"<style>{style_sheet}</style>"]
    parts.append(f'<rect width="{WIDTH * len(charts)}" height="{height}" fill="var(--page)"/>')
    for number, (chart, series) in enumerate(charts):
        content = "".join(_line_parts(chart, series))
        parts.append(f'<g transform="translate({number * WIDTH} 0)">{content}</g>')
    for number, line in enumerate(charts[0][1]):
        y = LINE_HEIGHT + LEGEND_ROW * (number + 0.5)
        parts.append(f'<path class="line s{line.style}" d="M{LEFT} {y:.1f}h32"/>')
        parts.append(marker(LEFT + 16, y, line.style))
        parts.append(_text(LEFT + 44, y + 5, line.label))
    label = escape("; ".join(chart.label for chart, _ in charts))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(charts)} {height}" '
        f'role="img" aria-label="{label}">{"".join(parts)}</svg>\n'
    )


def _line_parts(chart: LineChart, series: Sequence[Series]) -> list[str]:
    points_of = {line: _points(chart, line) for line in series}
    last_x = max(chart.first_x + 1, *(x for points in points_of.values() for x, _ in points))

    def place_x(x: float) -> float:
        fraction = (x - chart.first_x) / (last_x - chart.first_x)
        return LEFT + fraction * (WIDTH - LEFT - RIGHT)

    def place_y(y: float) -> float:
        fraction = (y - chart.low) / (chart.high - chart.low)
        return LINE_HEIGHT - BOTTOM - fraction * (LINE_HEIGHT - BOTTOM - TOP)

    parts = [*_y_axis(chart, place_y), *_x_axis(chart, last_x, place_x)]
    if chart.reference is not None:
        name, value = chart.reference
        y = place_y(value)
        parts.append(f'<path class="reference" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT + 6, y + 18, name, kind="small"))
    for line, values in points_of.items():
        points = [(place_x(x), place_y(min(max(y, chart.low), chart.high))) for x, y in values]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path class="line s{line.style}" d="M{path}"/>')
        if len(points) <= MAX_MARKED:
            parts += [marker(x, y, line.style) for x, y in points]
    return parts


def _points(chart: LineChart, line: Series) -> list[tuple[float, float]]:
    x = line.x or tuple(float(chart.first_x + index) for index in range(len(line.values)))
    return list(zip(x, line.values, strict=True))


def bar_chart(label: str, bars: Sequence[Series], show: Callable[[float], str]) -> str:
    """Horizontal bars from zero, each with its name above and its value behind."""
    longest = max((bar.values[0] for bar in bars), default=0) or 1
    parts = []
    for index, bar in enumerate(bars):
        top = index * BAR_ROW
        width = max(bar.values[0], 0) / longest * (WIDTH - VALUE_ROOM)
        parts.append(_text(0, top + 18, bar.label))
        parts.append(
            f'<rect class="bar s{bar.style}" x="0" y="{top + 25}" width="{width:.1f}" '
            f'height="{BAR_THICKNESS}" rx="2"/>'
        )
        parts.append(_text(width + 8, top + 25 + BAR_THICKNESS - 3, show(bar.values[0])))
    return _image(label, len(bars) * BAR_ROW, parts)


def dot_chart(label: str, rows: Sequence[Dots], show: Callable[[float], str]) -> str:
    """One row for each quantity on a common axis: runs as dots, mean, deviation, reference."""
    ends = [value for row in rows for value in _extent(row)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    margin = (high - low) * 0.05 or 1.0
    low, high = low - margin, high + margin
    base = len(rows) * BAR_ROW + 6

    def place(value: float) -> float:
        return RIGHT + (value - low) / (high - low) * (WIDTH - 2 * RIGHT)

    parts = []
    for tick in nice_ticks(low, high):
        x = place(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} 0V{base}"/>')
        parts.append(_text(x, base + 20, show(tick), anchor="middle"))
    for index, row in enumerate(rows):
        top = index * BAR_ROW
        y = top + 25 + BAR_THICKNESS / 2
        style = index % NUM_STYLES
        parts.append(_text(0, top + 18, row.label))
        if row.reference is not None:
            first, last = map(place, row.reference)
            box = f'x="{first - MARKER:.1f}" y="{y - 7:.1f}" width="{last - first + 9:.1f}"'
            parts.append(f'<rect class="published" {box} height="14" rx="3"/>')
        if row.mean is not None:
            x, reach = place(row.mean), row.deviation or 0.0
            ends_x = place(row.mean - reach), place(row.mean + reach)
            whisker = f"M{ends_x[0]:.1f} {y:.1f}H{ends_x[1]:.1f}M{x:.1f} {y - 8:.1f}v16"
            parts.append(f'<path class="whisker s{style}" d="{whisker}"/>')
        parts += [
            f'<circle class="marker s{style}" cx="{place(value):.1f}" cy="{y:.1f}" r="3.5"/>'
            for value in row.values
        ]
    return _image(label, base + 28, parts)


def _extent(row: Dots) -> list[float]:
    """Every number of a row that must lie on the axis."""
    ends = [*row.values, *(row.reference or ())]
    if row.mean is not None and row.deviation is not None:
        ends += [row.mean - row.deviation, row.mean + row.deviation]
    return ends


def marker(x: float, y: float, style: int) -> str:
    """A circle, square, diamond or triangle, so that lines differ without color."""
    m, d = MARKER, 1.4 * MARKER
    shapes = (
        f"M{x - m:.1f} {y:.1f}a{m} {m} 0 1 0 {2 * m} 0a{m} {m} 0 1 0 {-2 * m} 0Z",
        f"M{x - m:.1f} {y - m:.1f}h{2 * m}v{2 * m}h{-2 * m}Z",
        f"M{x:.1f} {y - d:.1f}l{d} {d}l{-d} {d}l{-d} {-d}Z",
        f"M{x:.1f} {y - 1.3 * m:.1f}l{1.2 * m} {2.2 * m}h{-2.4 * m}Z",
    )
    return f'<path class="marker s{style}" d="{shapes[style % len(shapes)]}"/>'


def swatch(line: Series) -> str:
    """A line's legend entry; decoration, because its name stands beside it."""
    point = marker(20, 8, line.style) if len(line.values) <= MAX_MARKED else ""
    return (
        '<svg class="swatch" viewBox="0 0 40 16" aria-hidden="true">'
        f'<path class="line s{line.style}" d="M2 8H38"/>{point}</svg>'
    )


def _y_axis(chart: LineChart, place_y: Callable[[float], float]) -> list[str]:
    parts = [_text(0, 14, chart.y_name, kind="small")]
    for tick in nice_ticks(chart.low, chart.high):
        y = place_y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 8, y + 5, chart.show(tick), anchor="end"))
    return parts


def _x_axis(chart: LineChart, last_x: float, place_x: Callable[[float], float]) -> list[str]:
    base = LINE_HEIGHT - BOTTOM
    parts = [_text((LEFT + WIDTH - RIGHT) / 2, LINE_HEIGHT - 6, chart.x_name, anchor="middle")]
    whole = (tick for tick in nice_ticks(chart.first_x, last_x, most=8) if tick == int(tick))
    parts += [_text(place_x(x), base + 20, chart.show_x(x), anchor="middle") for x in whole]
    return parts


def _text(x: float, y: float, content: str, *, anchor: str = "start", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def _image(label: str, height: int, parts: list[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
