"""Plots are pure functions of numbers: where points land, what is written, what is escaped."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from cache_service.api.page.drawing import SCALE, SIDE, hex_color, scale_color
from cli.experiments.demo.report import grid_map, scale_bar, view_symbol
from cli.experiments.demo.sample_view import CellGrid
from cli.experiments.svg import (
    LEFT,
    MAX_MARKED,
    RIGHT,
    WIDTH,
    LineChart,
    Series,
    bar_chart,
    line_chart,
    nice_ticks,
    swatch,
)


def chart(**changes):
    settings = {
        "label": "A chart",
        "x_name": "epochs",
        "y_name": "share",
        "first_x": 1,
        "low": 0.0,
        "high": 1.0,
        "show": "{:.0%}".format,
    }
    return LineChart(**(settings | changes))


def points(svg, style):
    (path,) = re.findall(rf'<path class="line s{style}" d="M([^"]+)"', svg)
    return [tuple(map(float, pair.split())) for pair in path.split("L")]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 13.6, [0, 5, 10]),
        (1, 4, [1, 2, 3, 4]),
        (0, 92, [0, 20, 40, 60, 80]),
        (0.0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (-3, 3, [-2, 0, 2]),
        (7, 7, [7]),
    ],
)
def test_ticks_are_few_and_round(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("high", [0.3, 1.7, 9, 11, 19.9, 20.1, 49, 51, 12345])
def test_there_are_never_too_many_ticks_nor_none(high):
    assert 2 <= len(nice_ticks(0, high, most=6)) <= 6


def test_points_span_the_axes_and_rise_with_their_value():
    svg = line_chart(chart(), [Series("a", (0.0, 0.5, 1.0), 0)])
    (x0, y0), (x1, y1), (x2, y2) = points(svg, 0)
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 > y1 > y2
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)


def test_values_beyond_the_axis_stay_inside_the_drawing():
    inside = line_chart(chart(), [Series("a", (0.0, 1.0), 0)])
    beyond = line_chart(chart(), [Series("a", (-5.0, 9.0), 0)])
    assert points(beyond, 0) == points(inside, 0)


def test_one_epoch_is_a_point_and_no_division_by_zero():
    assert points(line_chart(chart(), [Series("a", (0.5,), 3)]), 3)[0][0] == LEFT


def test_series_differ_in_shape_and_long_ones_go_without_markers():
    short, long = (0.5,) * MAX_MARKED, (0.5,) * (MAX_MARKED + 1)
    shapes = [swatch(Series("a", short, style)) for style in range(4)]
    assert len({re.sub(r"s\d", "", shape) for shape in shapes}) == 4
    assert "marker" not in line_chart(chart(), [Series("a", long, 0)])
    assert "marker" not in swatch(Series("a", long, 0))


def test_bars_are_as_long_as_their_values_are_large():
    svg = bar_chart("bars", [Series("a", (10.0,), 0), Series("b", (2.5,), 1)], "{:g} ms".format)
    long, short = (float(width) for width in re.findall(r'width="([\d.]+)"', svg))
    assert short == pytest.approx(long / 4, abs=0.1)
    assert ">2.5 ms<" in svg


def test_bars_of_nothing_are_drawn():
    assert 'width="0.0"' in bar_chart("bars", [Series("a", (0.0,), 0)], str)


def test_names_cannot_break_out_of_the_drawing():
    name = '"><script>&'
    grid = CellGrid(1, (0,), (0.0,), (False,))
    for svg in (
        line_chart(chart(label=name, x_name=name, reference=(name, 0.5)), [Series(name, (1,), 0)]),
        bar_chart(name, [Series(name, (1.0,), 0)], str),
        grid_map(grid, label=name, low=0, high=1),
    ):
        assert ET.fromstring(svg).get("aria-label") == name


def test_a_picture_is_drawn_from_its_pixels_alone():
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[1, 1:3] = (255, 128, 0)
    svg = view_symbol(pixels)
    assert svg == view_symbol(pixels.copy())
    drawn = re.findall(r'fill="(#\w+)" d="M(\d+) (\d+)h(\d+)', svg)
    assert drawn == [
        ("#000000", "0", "0", "4"),
        ("#000000", "0", "1", "1"),
        ("#ff8000", "1", "1", "2"),
        ("#000000", "3", "1", "1"),
    ]


def test_the_scale_runs_from_its_first_color_to_its_last_and_no_further():
    assert scale_color(0) == scale_color(-1) == hex_color(SCALE[0])
    assert scale_color(1) == scale_color(2) == hex_color(SCALE[-1])
    assert scale_color(0.5) == hex_color(SCALE[2])


def test_the_scale_grows_lighter_all_the_way():
    def lightness(share):
        red, green, blue = bytes.fromhex(scale_color(share)[1:])
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    values = [lightness(share / 20) for share in range(21)]
    assert values == sorted(values)


def test_each_cell_lies_in_its_place_with_its_prediction_logit_and_kind():
    grid = CellGrid(2, (7, 1, 7, 3), (9.0, -1.0, 4.0, 0.5), (False, True, False, True))
    svg = grid_map(grid, label="cells", low=-1.0, high=9.0)
    half = SIDE / 2
    tints = re.findall(r'<rect x="(\S+)" y="(\S+)" width="\S+" height="\S+" fill="(#\w+)"', svg)
    assert [(float(x), float(y)) for x, y, _ in tints] == [
        (0, 0),
        (half, 0),
        (0, half),
        (half, half),
    ]
    assert tints[0][2] == hex_color(SCALE[-1])
    assert tints[1][2] == hex_color(SCALE[0])
    assert re.findall(r'"cell (\w+)"', svg) == ["consistent", "complementary"] * 2
    assert re.findall(r'class="mark">(\d)<', svg) == ["7", "1", "7", "3"]
    assert re.findall(r"</tspan> ([-\d.]+)<", svg) == ["9.0", "-1.0", "4.0", "0.5"]


def test_equal_logits_have_a_color_too():
    grid = CellGrid(1, (0,), (2.0,), (False,))
    assert scale_color(0.5) in grid_map(grid, label="one", low=2.0, high=2.0)


def test_the_color_scale_says_its_ends():
    assert ">-0.8<" in scale_bar(-0.84, 18.4)
    assert ">18.4<" in scale_bar(-0.84, 18.4)
