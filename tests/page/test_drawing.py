"""Pictures are pure functions of numbers: what is where, what is said, and how much it takes."""

from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from cache_service.api.page.drawing import (
    SIDE,
    Cell,
    cell_map,
    coverage_picture,
    png_data_url,
    scale_bar,
)
from cache_service.api.page.formatting import fine_percent, latency, percent, prose
from cache_service.api.page.overview import LEVELS, coverage


def every(seeds, shards):
    return {seed: list(range(shards)) for seed in range(seeds)}


def test_one_shard_of_one_seed_is_one_box():
    found = coverage({0: [0]}, num_seeds=1, num_shards=1)
    assert found.levels_YX.tolist() == [[LEVELS - 1]]
    assert found.fraction == 1
    assert found.summary == "1 of 1 seeds complete, 1 of 1 shards recorded"
    assert found.axes == "Rows: seed 0; columns: 1 shard"


def test_nothing_recorded_is_drawn_as_nothing_recorded():
    found = coverage({}, num_seeds=3, num_shards=2)
    assert found.levels_YX.tolist() == [[0, 0]] * 3
    assert (found.fraction, found.complete) == (0, 0)


def test_a_small_cache_has_a_box_for_every_shard():
    found = coverage({0: [0, 1, 2], 1: [1]}, num_seeds=2, num_shards=3)
    assert found.levels_YX.tolist() == [[4, 4, 4], [0, 4, 0]]
    assert (found.recorded, found.complete, found.planned) == (4, 1, 6)


def test_300_seeds_of_1000_shards_are_summed_up_and_stay_small():
    commits = every(300, 1000)
    commits[299] = list(range(500))
    del commits[150]
    found = coverage(commits, num_seeds=300, num_shards=1000)
    assert found.levels_YX.shape == (40, 64)
    assert found.recorded == 298 * 1000 + 500
    assert found.levels_YX[0].tolist() == [4] * 64
    assert set(found.levels_YX[20].tolist()) == {3}  # 7 of its 8 seeds
    assert found.levels_YX[39, 0] == 4
    assert found.levels_YX[39, 63] == 3
    assert "about 7.5 in each" in found.axes
    assert len(coverage_picture(found.levels_YX, "words")) < 120_000


def test_a_box_is_full_only_where_every_shard_of_it_is_recorded():
    rng = np.random.default_rng(3)
    commits = {s: sorted(rng.choice(97, 60, replace=False).tolist()) for s in range(53)}
    found = coverage(commits, num_seeds=53, num_shards=97, rows=7, columns=10)
    counts = np.zeros((7, 10), int)
    wholes = np.zeros((7, 10), int)
    for seed in range(53):
        for shard in range(97):
            counts[seed * 7 // 53, shard * 10 // 97] += shard in commits[seed]
            wholes[seed * 7 // 53, shard * 10 // 97] += 1
    assert ((found.levels_YX == 4) == (counts == wholes)).all()
    assert ((found.levels_YX == 0) == (counts == 0)).all()


def test_a_build_of_late_seeds_is_not_drawn_as_a_thousand_missing_ones():
    found = coverage({1000: [0], 1003: [0]}, num_seeds=1008, num_shards=1)
    assert (found.first_seed, found.num_seeds, found.planned) == (1000, 8, 8)
    assert found.levels_YX.ravel().tolist() == [4, 0, 0, 4, 0, 0, 0, 0]


def test_the_picture_is_one_image_with_words_and_without_inline_style():
    found = coverage({0: [0]}, num_seeds=2, num_shards=2)
    picture = coverage_picture(found.levels_YX, "a <b>")
    root = ET.fromstring(picture)
    assert (root.get("role"), root.get("aria-label")) == ("img", "a <b>")
    assert "style" not in picture


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 7, 3), (224, 224, 3)])
def test_a_png_decodes_to_the_same_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    head, _, content = png_data_url(pixels).partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        image.load()
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def cell(**changes):
    fields = {"fraction": 0.5, "mark": "3", "value": "50%", "complementary": None}
    return Cell(**(fields | {"description": "a cat"} | changes))


def test_cells_lie_row_by_row_with_frames_by_kind():
    cells = [cell(complementary=kind) for kind in (True, False, False, True)]
    root = ET.fromstring(cell_map(2, cells, under="<rect/>", label="map"))
    places = [(float(r.get("x")), float(r.get("y"))) for r in root.iter("rect") if r.get("fill")]
    assert places == [(0, 0), (120, 0), (0, 120), (120, 120)]
    kinds = [p.get("class") for p in root.iter("path") if p.get("class", "").startswith("cell")]
    assert kinds == [
        "cell complementary",
        "cell consistent",
        "cell consistent",
        "cell complementary",
    ]


def test_no_name_can_break_out_of_a_drawing():
    name = '"><script>alert(1)</script>&'
    drawn = cell_map(1, [cell(mark=name, value=name, description=name)], under="", label=name)
    assert "<script" not in drawn + scale_bar("0", "1", name)
    assert ET.fromstring(drawn).get("aria-label") == name


def test_cells_too_small_for_a_chip_are_tinted_only():
    drawn = cell_map(16, [cell()] * 256, under="", label="map")
    assert "chip" not in drawn
    assert drawn.count("<title>") == 256


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 7, 8, 9])
@pytest.mark.parametrize("mark", ["3", "21", "64"])
@pytest.mark.parametrize("value", ["7%", "100%", "-12.5"])
def test_a_chip_says_the_mark_inside_its_cell_and_covers_less_than_a_quarter_of_it(
    scale, mark, value
):
    drawn = cell_map(scale, [cell(mark=mark, value=value)] * scale**2, under="", label="")
    root, side = ET.fromstring(drawn), SIDE / scale
    chips = [r for r in root.iter("rect") if r.get("class") == "chip"]
    assert len(chips) == scale**2
    for number, chip in enumerate(chips):
        x, y, width, height = (float(chip.get(name)) for name in ("x", "y", "width", "height"))
        row, column = divmod(number, scale)
        assert column * side < x < x + width < (column + 1) * side + 0.01
        assert row * side < y < y + height < (row + 1) * side + 0.01
        assert width * height < side * side / 4
    texts = ["".join(text.itertext()) for text in root.iter("text")]
    assert (
        set(texts) == {f"{mark} {value}"} if scale <= 2 else set(texts) <= {f"{mark} {value}", mark}
    )


def test_at_scale_4_mark_and_percentage_fit():
    drawn = cell_map(4, [cell(mark="21", value="99%")] * 16, under="", label="")
    assert drawn.count('<tspan class="mark">21</tspan> 99%</text>') == 16


@pytest.mark.parametrize(
    ("part", "text"),
    [(0, "0%"), (0.0004, "<1%"), (0.25, "25%"), (0.9996, ">99%"), (1, "100%")],
)
def test_percentages_never_round_to_certainty(part, text):
    assert percent(part) == text


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (0, "0%"),
        (3.21e-8, "3.2e-06%"),
        (0.000123, "0.012%"),
        (0.0456, "4.6%"),
        (0.1, "10%"),
        (0.9996, ">99%"),
        (1, "100%"),
    ],
)
def test_small_percentages_keep_two_digits(part, text):
    assert fine_percent(part) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "\N{EN DASH}"), (0.00042, "0.42 ms"), (0.0184, "18.4 ms"), (2, "2.0 s")],
)
def test_latencies_have_three_digits(seconds, text):
    assert latency(seconds) == text


def test_drawings_are_well_formed_at_every_scale():
    for scale in (1, 2, 4, 7, 16):
        drawn = cell_map(scale, [cell()] * scale**2, under="", label="x")
        assert len(re.findall("<g>", drawn)) == scale**2
        ET.fromstring(drawn)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("Run `kd-cache info`.", "Run <code>kd-cache info</code>."),
        ("`<b>` & <i>", "<code>&lt;b&gt;</code> &amp; &lt;i&gt;"),
        ("a lone ` stays", "A lone ` stays"),
        ("there is no cache.", "There is no cache."),
        ("augment.size is wrong.", "augment.size is wrong."),
        ("c/zarr.json is gone.", "c/zarr.json is gone."),
        ("", ""),
    ],
)
def test_commands_in_messages_are_code_and_nothing_else_is_markup(text, html):
    assert prose(text) == html
