"""Both MNIST reproductions from idx files to tables, on drawn digits; again for nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.builds import tree_bytes
from support.command import kd_cache

from cache_service.errors import ConfigError
from cache_service.rows.reader import open_cache
from cli.experiments.experiment_file import merge_documents, read_shipped
from cli.experiments.reproduce import shipped
from cli.experiments.reproduce.reproductions import REPRODUCTIONS, find_reproduction
from cli.experiments.reproduce.shipped import Options
from cli.experiments.result_table import render_markdown
from distill.checkpoint import CHECKPOINT_NAME

MOVED = {
    "size": 28,
    "ops": [
        {"op": "pad_crop", "padding": 1},
        {"op": "random_affine", "degrees": 12},
        {"op": "mixup", "alpha": 1.0},
    ],
}
SHORT = {"train": {"epochs": 3, "optimizer": {"name": "adamw", "lr": 0.005}}}
TINY = {
    "train": {"batch_size": 32, "workers": 0},
    "teachers": {
        "teacher": {
            "epochs": 5,
            "optimizer": {"name": "adamw", "lr": 0.005},
            "student": {"model_args": {"hidden": [48]}},
        }
    },
    "recordings": {"still": {"seeds": "0:2"}, "mixed": {"seeds": "0:2", "augment": MOVED}},
    "students": {"mlp": {"model_args": {"hidden": [24]}}},
    "methods": {"soft": SHORT, "mixed-soft": SHORT},
}
TINY_BY_NAME = {
    "hinton-mnist": merge_documents(TINY, {"methods": {"labels": SHORT, "mixed-labels": SHORT}}),
    "omitted-three": TINY,
}


def make(name, out, data, *, runs=1, messages=None, on_message=None, changes=None):
    listen = on_message or ((lambda line: None) if messages is None else messages.append)
    options = Options(
        name=name,
        out=str(out),
        data=str(data),
        runs=runs,
        quick=True,
        on_message=listen,
        changes=merge_documents(TINY_BY_NAME[name], changes or {}),
    )
    return find_reproduction(name).make(options).table


def kept(out):
    """Checkpoints, and every byte of the caches."""
    files = tree_bytes(out).items()
    return {key: value for key, value in files if "/cache/" in key or CHECKPOINT_NAME in key}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A folder with one finished run of both, in a few seconds."""
    out = tmp_path_factory.mktemp("finished")
    return out, make("hinton-mnist", out, data), make("omitted-three", out, data)


def test_hinton_mnist_measures_teacher_plain_and_soft_beside_the_published_figures(finished):
    _, table, _ = finished
    assert [row.published for row in table.rows] == [67, 146, 74, None, None]
    for row in table.rows:
        (run,) = row.runs
        assert run.failure is None
        assert run.best <= run.last < 90  # of 100 test images: better than chance
        assert 1 <= run.best_epoch <= run.epochs
    assert set(table.seconds) == {"teachers", "recordings", "students"}
    assert all(seconds > 0 for seconds in table.seconds.values())
    assert len(table.goals) == 2
    assert {"teachers", "recordings", "methods"} <= table.settings.keys()


@pytest.mark.parametrize("views", ["", ", mixed digits"])
def test_omitted_three_raises_the_bias_and_reports_threes_both_ways(finished, views):
    _, _, table = finished
    figures = {row.what: row.runs[0].last for row in table.rows}
    trained, raised = f"student{views}, as trained", f"bias raised{views}"
    assert figures[f"{trained}: threes wrong"] >= figures[f"{raised}: threes wrong"]
    assert figures[raised] <= figures[trained]
    assert figures[raised] <= figures[f"bias set on training set{views}"]


def test_omitted_three_holds_the_papers_figures_against_the_papers_views(finished):
    _, _, table = finished
    published = [row.published for row in table.rows]
    assert published == [67, 206, 133, 109, 14, None, None, *[None] * 6]
    assert "flatters" in render_markdown(table)


def test_the_goal_of_omitted_three_is_judged_on_mixed_digits_with_the_bias_raised(finished):
    _, _, table = finished
    figures = {row.what: row.runs[0].last for row in table.rows}
    threes = 10  # of the 100 test images
    right = 1 - figures["bias raised, mixed digits: threes wrong"] / threes
    (goal,) = table.goals
    assert (goal.measured, goal.met) == (f"{right:.2%}", right >= 0.98)


def test_the_omitted_class_is_neither_in_the_cache_nor_in_the_labels(finished):
    out, *_ = finished
    for recording in ("still", "mixed"):
        of_threes, of_all = (
            open_cache(
                str(out / "quick" / name / "recordings" / recording / "cache")
            ).spec.dataset.num_samples
            for name in ("omitted-three", "hinton-mnist")
        )
        assert (of_threes, of_all) == (270, 300)


def test_both_tables_share_their_teacher(finished, data):
    out, hinton, threes = finished
    assert hinton.rows[0].runs == threes.rows[0].runs
    assert (out / "quick" / "teacher" / CHECKPOINT_NAME).exists()


def test_the_same_call_again_trains_and_records_nothing(finished, data):
    out, *tables = finished
    before, messages = kept(out), []
    again = [make(name, out, data, messages=messages) for name in TINY_BY_NAME]
    assert [table.rows for table in again] == [table.rows for table in tables]
    for table, earlier in zip(again, tables, strict=True):
        assert table.seconds == pytest.approx(earlier.seconds, abs=0.01)
    assert all(line.endswith(" before") for line in messages)
    assert kept(out) == before


def test_more_seeds_add_runs_to_those_that_are_there(finished, data):
    out, table, _ = finished
    messages: list[str] = []
    more = make("hinton-mnist", out, data, runs=2, messages=messages)
    assert [row.runs[0].last for row in more.rows] == [row.runs[0].last for row in table.rows]
    assert [run.seed for run in more.rows[2].runs] == [0, 1]
    trained = [line for line in messages if not line.endswith("before")]
    assert all("seed 1" in line and "seed 0" not in line for line in trained)


def test_a_run_that_was_stopped_goes_on_where_it_was(finished, data, tmp_path):
    out, table, _ = finished
    shutil.copytree(out / "quick", tmp_path / "quick")
    shutil.rmtree(tmp_path / "quick/hinton-mnist/runs/mlp/soft/seed-0")

    def stop(line: str) -> None:
        if "epoch 2 of 3: soft seed 0" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("hinton-mnist", tmp_path, data, on_message=stop)
    messages: list[str] = []
    resumed = make("hinton-mnist", tmp_path, data, messages=messages)
    assert [row.values for row in resumed.rows] == [row.values for row in table.rows]
    # The epoch whose report was stopped was not saved yet.
    first = next(line for line in messages if not line.endswith("before"))
    assert "epoch 2 of 3: soft seed 0" in first


def test_without_a_usable_teacher_students_on_soft_targets_are_failures(data, tmp_path):
    idle = {"epochs": 1, "optimizer": {"name": "sgd", "lr": 1e-9}, "schedule": {"name": "constant"}}
    table, threes = (
        make(name, tmp_path, data, runs=2, changes={"teachers": {"teacher": idle}})
        for name in TINY_BY_NAME
    )
    _, plain, soft, *_ = table.rows
    assert (len(plain.values), soft.mean) == (2, None)
    assert [run.failure for run in soft.runs] == [soft.failures[0]] * 2
    assert soft.failures[0].startswith("no recording: ")
    assert [goal.met for goal in (*table.goals, *threes.goals)] == [None] * 3
    assert "**failed**" in render_markdown(table)
    assert [row.mean for row in threes.rows[1:]] == [None] * 12


def test_a_folder_with_other_settings_is_refused(finished, data):
    out, *_ = finished
    other = {"teachers": {"teacher": {"optimizer": {"lr": 0.01}}}}
    with pytest.raises(ConfigError, match=r"other settings: optimizer\.lr"):
        make("hinton-mnist", out, data, changes=other)


def test_the_command_writes_page_json_and_report_and_prints_the_document(
    finished, data, monkeypatch
):
    out, *_ = finished
    read = shipped.shipped_document
    monkeypatch.setattr(
        "cli.experiments.reproduce.hinton.shipped_document",
        lambda options, root: read(
            options._replace(changes=TINY_BY_NAME["hinton-mnist"]), root=root
        ),
    )
    options = ("--quick", "--out", str(out), "--data", str(data))
    ended = kd_cache("reproduce", "hinton-mnist", *options, "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document["command"] == "kd-cache reproduce hinton-mnist --quick --seeds 1"
    page = Path(document["written"]["markdown"])
    assert page == out / "hinton-mnist-quick.md"
    assert page.read_text().startswith("# Soft targets on MNIST")
    written = json.loads((out / "hinton-mnist-quick.json").read_text())
    assert written["rows"] == document["rows"]
    assert (out / "hinton-mnist-quick.html").exists()
    assert str(data) not in page.read_text()


def test_an_unknown_name_is_one_line_that_lists_the_names():
    ended = kd_cache("reproduce", "nothing")
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 1
    assert all(name in ended.err for name in REPRODUCTIONS)


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line_before_data_are_looked_for(tmp_path, device):
    out = tmp_path / "out"
    options = ("--device", device, "--out", str(out), "--data", str(tmp_path / "none"))
    ended = kd_cache("reproduce", "sdd-cifar100", "--quick", *options)
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    assert device in ended.err
    assert "CIFAR-100" not in ended.err
    assert not out.exists()


def test_missing_data_is_one_line_before_anything_is_written(tmp_path):
    out = tmp_path / "out"
    ended = kd_cache("reproduce", "omitted-three", "--out", str(out), "--data", str(tmp_path))
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    assert "train-images-idx3-ubyte.gz" in ended.err
    assert not out.exists()


def test_every_reproduction_has_an_experiment_file():
    assert set(REPRODUCTIONS) == {
        "hinton-mnist",
        "omitted-three",
        "sdd-cifar100",
        "deit-cifar100",
        "ddgsd-cifar100",
        "seeds-cifar100",
    }
    for name in REPRODUCTIONS:
        assert read_shipped(name)["quick"]
