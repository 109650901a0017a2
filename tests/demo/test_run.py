"""The whole demo at toy size: what it promises about one run, and about the next one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from demo.conftest import BATCH_SIZE, run_tiny
from typer.testing import CliRunner

from cache_service.config import parse_yaml
from cache_service.errors import ConfigError
from cli.experiments.demo.run import MEASURED_NAME, loss_curve
from cli.main import app

NAMES = ["alone", "live", "kd", "sd-kd"]


def test_every_student_is_trained_on_the_same_views_by_its_own_method(demo):
    assert [row.name for row in demo.result.rows] == NAMES
    assert [job.train.method.name for job in demo.jobs] == ["ce", "kd", "kd", "sd-kd"]
    assert [bool(job.train.caches) for job in demo.jobs] == [False, False, True, True]
    assert [job.teacher is not None for job in demo.jobs] == [False, True, False, False]
    first = demo.jobs[0].train
    assert first.seeds == (0, 1)
    for job in demo.jobs[1:]:
        assert job.train.student == first.student
        assert job.train.seed == first.seed
        assert job.train.seeds in (None, first.seeds)


def test_the_losses_from_the_cache_are_those_with_the_live_teacher(demo):
    found = demo.result.agreement
    assert len(found.live) == math.ceil(demo.result.recording.views / 2 / BATCH_SIZE)
    assert 0 < found.max_abs_difference < found.tolerance  # float16 rows, not the same answers
    assert found.holds


def test_the_compared_steps_are_those_that_the_training_from_the_cache_took(demo):
    steps = len(demo.result.agreement.cached)
    assert list(demo.result.agreement.cached) == list(demo.result.cached_losses[:steps])


def test_the_document_is_json_with_one_row_for_each_student(demo):
    document = json.loads(json.dumps(demo.result.document("x/report.html"), allow_nan=False))
    assert [row["name"] for row in document["rows"]] == NAMES
    for row in document["rows"]:
        assert 0 <= row["accuracy"] <= 1
        assert row["accuracy"] == row["accuracy_by_epoch"][-1]
        assert row["seconds_per_step"] > 0
        assert isinstance(row["peak_memory_bytes"], int)
    assert document["losses_equal"]["holds"] is True
    assert document["losses_equal"]["max_abs_difference"] <= document["losses_equal"]["tolerance"]
    assert document["cache"]["views"] == 2 * 1442
    assert document["report"] == "x/report.html"


def test_it_reports_what_it_does_in_sentences(demo):
    assert [line for line in demo.messages if line[0].isdigit()] == [
        "1 of 4: training the teacher, resnet8x4, on labels.",
        "2 of 4: recording its logits for every view.",
        "3 of 4: training one student 4 ways on these views.",
        "4 of 4: comparing losses, and writing the report.",
    ]
    assert any("Cache, SD-KD: epoch 2 of 2" in line for line in demo.messages)


def test_the_report_is_in_the_folder(demo):
    assert (Path(demo.out) / "report.html").read_text().startswith("<!doctype html>")


def test_a_second_run_keeps_what_the_first_one_finished(demo):
    again = run_tiny(demo.out)
    assert again.jobs == []
    assert again.result.rows == demo.result.rows
    assert again.result.recording == demo.result.recording
    assert again.result.agreement == demo.result.agreement
    assert "demo: recording cache: recorded before" in again.messages


def test_a_student_that_was_interrupted_starts_over_alone(demo):
    measured, before = Path(demo.out) / "kd" / MEASURED_NAME, loss_curve(f"{demo.out}/kd")
    kept = measured.read_bytes()
    measured.unlink()
    again = run_tiny(demo.out)
    measured.write_bytes(kept)  # others look at this folder, too
    assert [job.train.out for job in again.jobs] == [f"{demo.out}/kd"]
    assert loss_curve(f"{demo.out}/kd") == before  # a whole run, not the rest of one
    assert [row for row in again.result.rows if row.name != "kd"] == [
        row for row in demo.result.rows if row.name != "kd"
    ]


def test_a_folder_of_another_teacher_is_refused_and_left_alone(demo):
    before = (Path(demo.out) / "build.yaml").read_bytes()
    with pytest.raises(ConfigError, match="Choose another `out`"):
        run_tiny(demo.out, changes={"teachers": {"teacher": {"optimizer": {"lr": 0.5}}}})
    assert (Path(demo.out) / "build.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("build", "build.yaml"), '"shards_committed": 0'),
        (("train", "teacher.yaml"), '"method": "ce"'),
        (("train", "kd.yaml"), '"steps": 24'),
        (("train", "sd-kd.yaml"), '"steps": 24'),
    ],
)
def test_its_files_run_again_and_find_nothing_left_to_do(demo, command, says):
    verb, name = command
    found = CliRunner().invoke(app, [verb, str(Path(demo.out) / name), "--json"])
    assert found.exit_code == 0, found.output
    assert says in found.stdout


def test_its_files_are_plain_yaml_that_says_how_to_run_it(demo):
    for name, text in demo.result.files.items():
        assert (Path(demo.out) / name).read_text() == text
        assert text.startswith("# kd-cache ")
        assert "&id" not in text
        assert isinstance(parse_yaml(text, where=name), dict)


def test_the_view_shown_has_cells_of_both_kinds_and_is_read_right_as_a_whole(demo):
    sample = demo.result.sample
    whole, quarters = sample.grids
    assert whole.complementary == (False,)
    assert whole.top == (sample.label,)
    assert sample.likeliest[0][0] == sample.label
    assert 0 < sum(quarters.complementary) < 4
    for top, marked in zip(quarters.top, quarters.complementary, strict=True):
        assert marked == (top != sample.label)
