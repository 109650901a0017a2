"""Both reproductions from idx files to tables, on drawn digits; again for nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.builds import tree_bytes
from support.command import kd_cache

from cache_service.errors import ConfigError
from cache_service.reader import open_cache
from cli.experiments.reproduce import hinton_mnist, omitted_three
from cli.experiments.reproduce.cohort import train_cohort
from cli.experiments.reproduce.hinton import HintonSettings, Moves, Transfer, student_document
from cli.experiments.reproduce.markdown import render_markdown
from cli.experiments.reproduce.order import Order
from cli.experiments.reproduce.registry import REPRODUCTIONS, find_reproduction
from cli.experiments.reproduce.runs import count_wrong
from distill.checkpoint import CHECKPOINT_NAME
from distill.config import TrainConfig
from distill.optim import SGD


def make_order(out, data, *, seeds=1, said=None):
    say = (lambda line: None) if said is None else said.append
    return Order(out=str(out), data=str(data), seeds=seeds, quick=True, say=say)


def kept(out):
    """Checkpoints, and every byte of the caches."""
    files = tree_bytes(out).items()
    return {key: value for key, value in files if "/cache/" in key or CHECKPOINT_NAME in key}


def transfer(mixup=None, **moves):
    rate = SGD(lr=0.1)
    return Transfer(
        moves=Moves(**moves),
        mixup=mixup,
        epochs=3,
        recorded=2,
        alpha=0.9,
        label_optimizer=rate,
        soft_optimizer=rate,
    )


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A folder with one finished run of both, in a few seconds."""
    settings = HintonSettings(
        teacher_hidden=(48,),
        teacher_epochs=5,
        teacher_batch=32,
        teacher_optimizer=SGD(lr=0.1),
        student_hidden=(24,),
        student_batch=32,
        unmoved=transfer(),
        mixed=transfer(jitter=1, degrees=12, mixup=1.0),
        omitted=transfer(jitter=1, degrees=12, mixup=1.0),
        workers=0,
    )
    out = tmp_path_factory.mktemp("finished")
    order = make_order(out, data)
    tables = [module.reproduce(order, settings) for module in (hinton_mnist, omitted_three)]
    return out, settings, *tables


def test_hinton_mnist_measures_teacher_plain_and_soft_beside_the_published_figures(finished):
    _, _, table, _ = finished
    assert [row.published for row in table.rows] == [67, 146, 74, None, None]
    for row in table.rows:
        (run,) = row.runs
        assert run.failure is None
        assert run.best <= run.last < 90  # of 100 test images: more than chance
        assert 1 <= run.best_epoch <= run.epochs
    assert set(table.seconds) == {
        "teacher",
        "recording",
        "students on labels",
        "students on soft targets",
    }
    assert all(seconds > 0 for seconds in table.seconds.values())
    assert len(table.goals) == 2
    assert {"teacher_hidden", "temperature", "max_norm"} <= table.settings.keys()


@pytest.mark.parametrize("views", ["", ", mixed digits"])
def test_omitted_three_raises_the_bias_and_reports_threes_both_ways(finished, views):
    _, _, _, table = finished
    figures = {row.what: row.runs[0].last for row in table.rows}
    trained, raised = f"student{views}, as trained", f"bias raised{views}"
    assert figures[f"{trained}: threes wrong"] >= figures[f"{raised}: threes wrong"]
    assert figures[raised] <= figures[trained]
    assert figures[raised] <= figures[f"bias set on training set{views}"]


def test_omitted_three_holds_the_papers_figures_against_the_papers_views(finished):
    _, _, _, table = finished
    published = [row.published for row in table.rows]
    assert published == [67, 206, 133, 109, 14, None, None, *[None] * 6]
    assert "flatters" in render_markdown(table)


def test_the_goal_of_omitted_three_is_judged_on_mixed_digits_with_the_bias_raised(finished):
    _, _, _, table = finished
    figures = {row.what: row.runs[0].last for row in table.rows}
    threes = 10  # of the 100 test images
    right = 1 - figures["bias raised, mixed digits: threes wrong"] / threes
    (goal,) = table.goals
    assert (goal.measured, goal.met) == (f"{right:.2%}", right >= 0.98)


def test_the_omitted_class_is_neither_in_the_cache_nor_in_the_labels(finished):
    out, *_ = finished
    for cache in ("cache", "mixed-cache"):
        of_threes, of_all = (
            open_cache(str(out / "quick" / name / cache)).spec.dataset.num_samples
            for name in ("omitted-three", "hinton-mnist")
        )
        assert (of_threes, of_all) == (270, 300)


def test_the_same_call_again_trains_and_records_nothing(finished, data):
    out, settings, *tables = finished
    before = kept(out)
    said: list[str] = []
    order = make_order(out, data, said=said)
    again = [module.reproduce(order, settings) for module in (hinton_mnist, omitted_three)]
    assert [table.rows for table in again] == [table.rows for table in tables]
    for table, earlier in zip(again, tables, strict=True):
        assert table.seconds == pytest.approx(earlier.seconds, abs=0.01)
    assert all(line.endswith(" before") for line in said)
    assert kept(out) == before


def test_more_seeds_add_runs_to_those_that_are_there(finished, data):
    out, settings, table, _ = finished
    said: list[str] = []
    more = hinton_mnist.reproduce(make_order(out, data, seeds=2, said=said), settings)
    assert [row.runs[0] for row in more.rows] == [row.runs[0] for row in table.rows]
    assert [run.seed for run in more.rows[2].runs] == [0, 1]
    trained = [line for line in said if not line.endswith("before")]
    kinds = ("labels", "soft", "mixed-labels", "mixed-soft")
    assert {line.partition(":")[0] for line in trained} == {f"hinton-mnist {k}" for k in kinds}
    assert all("seed-1" in line and "seed-0" not in line for line in trained)


def test_a_run_that_was_stopped_goes_on_where_it_was(finished, data, tmp_path):
    out, settings, table, _ = finished
    shutil.copytree(out / "quick", tmp_path / "quick")
    shutil.rmtree(tmp_path / "quick/hinton-mnist/soft-0")

    def stop_midway(line: str) -> None:
        if "mnist soft: epoch 2" in line:
            raise KeyboardInterrupt

    order = make_order(tmp_path, data)
    with pytest.raises(KeyboardInterrupt):
        hinton_mnist.reproduce(order._replace(say=stop_midway), settings)
    said: list[str] = []
    resumed = hinton_mnist.reproduce(order._replace(say=said.append), settings)
    assert [row.values for row in resumed.rows] == [row.values for row in table.rows]
    # The epoch whose report was stopped was not kept yet.
    first = next(line for line in said if not line.endswith("before"))
    assert first.startswith("hinton-mnist soft: epoch 2")


def test_without_a_usable_teacher_students_on_soft_targets_are_failures(finished, data, tmp_path):
    _, settings, *_ = finished
    idle = settings.model_copy(update={"teacher_optimizer": SGD(lr=1e-9), "teacher_epochs": 1})
    order = make_order(tmp_path, data, seeds=2)
    table, threes = (module.reproduce(order, idle) for module in (hinton_mnist, omitted_three))
    _, plain, soft, *_ = table.rows
    assert (len(plain.values), soft.mean) == (2, None)
    assert [run.failure for run in soft.runs] == [soft.failures[0]] * 2
    assert soft.failures[0].startswith("no soft targets: ")
    assert [goal.met for goal in (*table.goals, *threes.goals)] == [None] * 3
    assert "**failed**" in render_markdown(table)
    assert [row.mean for row in threes.rows[1:]] == [None] * 12


def test_a_run_that_diverges_is_a_failure_that_says_where(finished, data, tmp_path):
    _, settings, *_ = finished
    order = make_order(tmp_path, data)
    document = student_document(
        settings, order, settings.unmoved, seed=4, out=str(tmp_path / "run")
    )
    document["student"]["model"] = "support.strokes:overflowing"
    said: list[str] = []
    config = TrainConfig.model_validate(document)
    outcome = train_cohort({"lone": config}, title="wild", say=said.append)["lone"]
    run = outcome.measured(count_wrong)
    assert (run.seed, run.last, run.best) == (4, None, None)
    assert "step 0 is not finite" in run.failure
    assert len(said) == 1
    assert said[0].startswith(f"wild: failed: {run.failure}")


def test_a_folder_with_other_settings_is_refused(finished, data):
    out, settings, *_ = finished
    other = settings.model_copy(update={"teacher_optimizer": SGD(lr=0.01)})
    with pytest.raises(ConfigError, match=r"other settings: optimizer\.lr"):
        hinton_mnist.reproduce(make_order(out, data), other)


def test_the_command_writes_page_and_json_and_prints_the_document(finished, data, monkeypatch):
    out, settings, *_ = finished
    monkeypatch.setattr(hinton_mnist, "QUICK", settings)
    options = ("--quick", "--out", str(out), "--data", str(data))
    ended = kd_cache("reproduce", "hinton-mnist", *options, "--json")
    assert ended.code == 0
    document = json.loads(ended.out)
    assert document["command"] == "kd-cache reproduce hinton-mnist --quick --seeds 1"
    page = Path(document["written"]["markdown"])
    assert page == out / "hinton-mnist-quick.md"
    assert page.read_text().startswith("# Soft targets on MNIST")
    written = json.loads((out / "hinton-mnist-quick.json").read_text())
    assert written["rows"] == document["rows"]
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


def test_every_reproduction_is_found_by_its_name():
    assert {name: find_reproduction(name).name for name in REPRODUCTIONS} == {
        name: name
        for name in (
            "hinton-mnist",
            "omitted-three",
            "sdd-cifar100",
            "deit-cifar100",
            "ddgsd-cifar100",
        )
    }
