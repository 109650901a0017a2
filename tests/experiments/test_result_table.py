"""The page of a reproduction: every figure beside the published one, and failures too."""

from __future__ import annotations

import json

import pytest

from cli.experiments.result_table import Goal, Measured, Row, Table, render_markdown

FAILURE = "the loss of step 7 is not finite (a|b)."


def run(seed, last, best=None):
    return Measured(
        seed=seed, last=last, best=best or last, best_epoch=3, epochs=5, seconds=90.0 + seed
    )


def make_table(**changes):
    rows = (
        Row(what="teacher", published=67, runs=(run(0, 70),)),
        Row(what="plain", published=146, runs=(run(0, 150, 148), run(1, 140), run(2, 160))),
        Row(what="soft", published=74, runs=(run(0, 80), Measured(seed=1, failure=FAILURE))),
        Row(what="threes", published=None, runs=(Measured(seed=0, failure=FAILURE),)),
    )
    goals = (
        Goal(text="few errors", measured="75", met=True),
        Goal(text="gap", measured="50%", met=False),
        Goal(text="threes", measured="a run failed", met=None),
    )
    parts = {
        "name": "some",
        "title": "Some table",
        "source": "A paper.",
        "quick": False,
        "command": "kd-cache reproduce some --seeds 3",
        "rows": rows,
        "goals": goals,
        "notes": ("Read with care.",),
        "settings": {"epochs": 5},
        "machine": {"cores": 2},
        "versions": {"torch": "2"},
        "seconds": {"teacher": 60.0, "students": 7200.0},
    }
    return Table(**parts | changes)


def line_of(page, start):
    return next(line for line in page.splitlines() if line.startswith(f"| {start} |"))


def test_a_row_says_published_mean_deviation_each_run_best_epoch_and_time():
    line = line_of(render_markdown(make_table()), "plain")
    assert line == (
        "| plain | 146 | 150.0 +- 10.0 | seed 0: 150; seed 1: 140; seed 2: 160 | "
        "148 at 3 of 5; 140 at 3 of 5; 160 at 3 of 5 | 2 min |"
    )


def test_one_run_has_no_deviation():
    assert "| 67 | 70 | seed 0: 70 |" in line_of(render_markdown(make_table()), "teacher")


def test_a_failed_run_stays_in_the_table_with_its_reason():
    page = render_markdown(make_table())
    told = "the loss of step 7 is not finite (a\\|b)."
    assert f"| 80 (**1 failed**) | seed 0: 80; seed 1: failed: {told} |" in line_of(page, "soft")
    assert f"| - | **failed** | seed 0: failed: {told} | - | - |" in line_of(page, "threes")


def test_goals_are_met_not_met_or_not_measured():
    page = render_markdown(make_table())
    assert line_of(page, "few errors") == "| few errors | 75 | met |"
    assert line_of(page, "gap") == "| gap | 50% | **not met** |"
    assert "| threes | a run failed | **not measured** |" in page


def test_settings_machine_versions_time_and_command_are_on_the_page():
    page = render_markdown(make_table())
    for text in ("epochs: 5", "cores: 2", "torch: '2'", "`kd-cache reproduce some --seeds 3`"):
        assert text in page
    assert line_of(page, "together") == "| together | 2 h 01 min |"


def test_percentages_have_two_digits_and_published_ones_may_be_a_range():
    rows = (
        Row(what="kd", published=73.33, runs=(run(0, 73.0), run(1, 74.5, 75.0))),
        Row(what="sd-kd", published=(75.3, 75.6), runs=(run(0, 75.25),)),
    )
    page = render_markdown(make_table(rows=rows, unit="accuracy"))
    assert line_of(page, "kd").startswith(
        "| kd | 73.33 | 73.75 +- 1.06 | seed 0: 73.00; seed 1: 74.50 | 73.00 at 3 of 5; 75.00 at"
    )
    assert line_of(page, "sd-kd").startswith("| sd-kd | 75.30 to 75.60 | 75.25 |")
    assert "Figures are percentages of the test set classified correctly" in page


def test_counts_stay_whole_numbers_in_json():
    document = make_table().document()
    assert document["unit"] == "errors"
    assert [type(each["last"]) for each in document["rows"][1]["runs"]] == [int] * 3


@pytest.mark.parametrize("quick", [True, False])
def test_only_the_quick_form_says_that_it_is_not_the_full_form(quick):
    assert ("Quick form" in render_markdown(make_table(quick=quick))) == quick


def test_the_json_form_has_mean_and_deviation_and_every_run():
    document = json.loads(json.dumps(make_table().document(), allow_nan=False))
    plain, soft, threes = document["rows"][1:]
    assert (plain["mean"], plain["standard_deviation"]) == (150.0, 10.0)
    assert plain["spread"] == plain["standard_deviation"]
    assert (soft["mean"], soft["spread"], soft["runs"][1]["failure"]) == (80.0, None, FAILURE)
    assert threes["mean"] is None
