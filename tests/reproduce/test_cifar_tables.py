"""The tables on CIFAR-100 from strips to pages, on drawn colors with tiny networks."""

from __future__ import annotations

import json

import pytest
from support.builds import tree_bytes
from support.command import kd_cache

from cache_service.errors import ConfigError
from cache_service.rows.reader import open_cache
from cli.experiments.experiment_file import merge_documents
from cli.experiments.reproduce import reproductions, shipped
from cli.experiments.reproduce.reproductions import find_reproduction
from cli.experiments.reproduce.shipped import Options
from cli.experiments.result_table import render_markdown
from distill.checkpoint import CHECKPOINT_NAME, load_checkpoint
from distill.reporting import read_metrics

RESNET = {
    "model": "cli.experiments.reproduce.networks:resnet",
    "model_args": {"depth": 8, "widths": [4, 4, 8, 8]},
}
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}


def images(shrink):
    args = {"num_classes": None, "shrink": shrink}
    size = 32 // shrink
    crop = {"op": "pad_crop", "padding": 4 // shrink}
    return {
        "dataset": {"args": args},
        "evaluate": {"dataset": {"args": args}},
        "augment": {"size": size, "ops": [crop, {"op": "horizontal_flip"}]},
    }


def training(epochs=3, **optimizer):
    return {
        "optimizer": {"name": "sgd", "lr": 0.05} | optimizer,
        "schedule": {"name": "constant"},
        "epochs": epochs,
        "batch_size": 8,
    }


CHANGES = {
    "sdd-cifar100": images(2) | {"train": training(2), "recordings": {"cells": {"seeds": "0:2"}}},
    "ddgsd-cifar100": images(4) | {"train": training(), "students": {"resnet18": RESNET}},
    "seeds-cifar100": images(4)
    | {
        "train": training(2),
        "teachers": {"teacher": {"student": RESNET}},
        "recordings": {
            "seeds-5": {"seeds": "0:2"},
            "seeds-10": {"seeds": "0:2"},
            "all": {"seeds": "0:2"},
        }
        | {"repeats": {"seeds": "0:2", "augment": {"size": 8}}},
        "students": {"small": RESNET},
    },
    "deit-cifar100": images(4)
    | {
        "train": training(2, name="adamw", lr=0.02),
        "teachers": {
            "cnn": training() | {"student": RESNET},
            "cnn-2": training() | {"student": RESNET},
            "vit": {"student": {"model_args": VIT}},
        },
        "recordings": {name: {"seeds": "0:1"} for name in ("cnn", "cnn-2", "vit")},
        "students": {name: {"model_args": VIT} for name in ("one-token", "two-tokens")},
    },
}
NAMES = sorted(CHANGES)


def make_options(name, out, strips, *, changes=None, **others):
    options = Options(
        name=name,
        out=str(out),
        data=str(strips),
        runs=1,
        quick=True,
        on_message=lambda line: None,
        changes=merge_documents(CHANGES[name], changes or {}),
    )
    return options._replace(**others)


def make(name, out, strips, **others):
    return find_reproduction(name).make(make_options(name, out, strips, **others)).table


def kept(out):
    files = tree_bytes(out).items()
    return {key: value for key, value in files if "/cache/" in key or CHECKPOINT_NAME in key}


@pytest.fixture(scope="module")
def finished(strips, tmp_path_factory):
    """A folder and the tables that were made in it, by name: each the first time asked for."""
    out, tables = tmp_path_factory.mktemp("finished"), {}

    def table_of(name):
        if name not in tables:
            tables[name] = make(name, out, strips)
        return tables[name]

    return out, table_of


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_measured_beside_the_published_one(finished, name):
    _, table_of = finished
    table = table_of(name)
    page = render_markdown(table)
    for row in table.rows:
        assert row.failures == (), row.what
        assert len(row.runs) == 1
        assert 0 <= row.mean <= 100
    assert table.unit in {"accuracy", "error rate"}
    assert all(goal.met is not None for goal in table.goals)
    assert all(seconds >= 0 for seconds in table.seconds.values())
    assert f"reproduce {name} --quick --seeds 1" in page
    json.dumps(table.document(), allow_nan=False)


def test_sdd_trains_every_method_on_one_recording(finished):
    out, table_of = finished
    titles = [row.what.rpartition(", ")[2] for row in table_of("sdd-cifar100").rows[1:]]
    assert titles == ["labels", "KD", "DKD", "NKD", "SD-KD", "SD-DKD", "SD-NKD"]
    (folder,) = (out / "quick/sdd-cifar100/recordings").iterdir()
    fingerprint = open_cache(str(folder / "cache")).fingerprint
    runs = sorted((out / "quick/sdd-cifar100/runs/student").glob("sd-*/seed-0"))
    assert len(runs) == 3
    for run in runs:
        assert load_checkpoint(run)["identity"]["caches"] == [fingerprint]


def test_deit_has_one_and_several_tokens_and_two_cycles(finished):
    out, table_of = finished
    published = {row.what: row.published for row in table_of("deit-cifar100").rows}
    assert "hard, DeiT + CNN, cycle 2, 3 tokens: top-1" in published
    assert "soft, CNN + CNN, 2 tokens: top-5" in published
    assert published["hard, DeiT: top-1"] == 11.9
    assert published["soft, DeiT + CNN: top-1"] == 12.5
    assert published["soft, DeiT + CNN: top-5"] == 1.5
    assert published["soft, DeiT + CNN, 2 tokens: top-5"] is None
    assert published["teacher, CNN: top-5"] == 1.8
    each = load_checkpoint(out / "quick/deit-cifar100/cycle-each-0/round-2/hard")
    assert each["config"]["student"]["model_args"]["num_tokens"] == 3
    assert len(each["identity"]["caches"]) == 3


def test_seconds_that_students_shared_count_once(finished):
    out, table_of = finished
    (seconds,) = table_of("ddgsd-cifar100").seconds.values()
    folder = out / "quick/ddgsd-cifar100/runs/resnet18"
    spent = [
        [line["epoch_s"] for line in read_metrics(str(folder / name)) if line["kind"] == "epoch"]
        for name in ("labels/seed-0", "ddgsd/seed-0")
    ]
    assert spent[0] == spent[1]
    assert seconds == pytest.approx(sum(spent[0]))


def test_ddgsd_has_fewer_or_more_errors_than_labels_and_the_goal_says_which(finished):
    _, table_of = finished
    (goal,) = table_of("ddgsd-cifar100").goals
    plain, own = (row.mean for row in table_of("ddgsd-cifar100").rows)
    assert goal.met == (own < plain)
    assert [row.published for row in table_of("ddgsd-cifar100").rows] == [30.15, 26.6]


@pytest.mark.parametrize("name", ["ddgsd-cifar100", "sdd-cifar100"])
def test_the_same_call_again_trains_and_records_nothing(finished, strips, name):
    out, table_of = finished
    table, before = table_of(name), kept(out)
    messages = []
    assert make(name, out, strips, on_message=messages.append).rows == table.rows
    assert all(line.endswith(" before") for line in messages)
    assert kept(out) == before


def test_another_seed_joins_those_that_are_there(finished, strips):
    out, table_of = finished
    table, messages = table_of("ddgsd-cifar100"), []
    more = make("ddgsd-cifar100", out, strips, runs=2, on_message=messages.append)
    assert [row.runs[0] for row in more.rows] == [row.runs[0] for row in table.rows]
    assert [[run.seed for run in row.runs] for row in more.rows] == [[0, 1], [0, 1]]
    assert [line.partition(": ")[2].partition(":")[0] for line in messages] == [
        f"epoch {epoch} of 3" for epoch in (1, 2, 3)
    ]
    assert all("seed 0" not in line for line in messages)


def test_a_table_that_was_stopped_goes_on_where_it_was(finished, strips, tmp_path):
    _, table_of = finished

    def stop(line):
        if "epoch 2 of 3" in line:
            raise KeyboardInterrupt

    messages = []
    with pytest.raises(KeyboardInterrupt):
        make("ddgsd-cifar100", tmp_path, strips, on_message=stop)
    resumed = make("ddgsd-cifar100", tmp_path, strips, on_message=messages.append)
    assert resumed.rows == table_of("ddgsd-cifar100").rows
    assert "epoch 1 of 3" not in "".join(messages)


@pytest.mark.parametrize("name", ["sdd-cifar100", "deit-cifar100"])
def test_without_a_usable_teacher_its_students_are_failures(strips, tmp_path, name):
    idle = training(1, lr=1e-9)
    changes = (
        {"train": idle}
        if name == "sdd-cifar100"
        else {"train": idle, "teachers": {"cnn": idle, "cnn-2": idle, "vit": idle}}
    )
    table = make(name, tmp_path, strips, changes=changes, runs=2)
    failed = [row for row in table.rows if row.failures]
    assert len(failed) >= 7
    assert {len(row.failures) for row in failed} == {2}
    assert failed[0].failures[0].startswith("no recording: teacher ")
    assert str(tmp_path) not in render_markdown(table)


def test_a_folder_with_other_settings_is_refused(finished, strips):
    out, table_of = finished
    table_of("ddgsd-cifar100")
    other = {"methods": {"ddgsd": {"mmd": 0.0}}}
    with pytest.raises(ConfigError, match=r"other settings: method\.mmd"):
        make("ddgsd-cifar100", out, strips, changes=other)


def test_the_command_writes_page_and_json(finished, strips, monkeypatch):
    out, table_of = finished
    table_of("ddgsd-cifar100")
    read = shipped.shipped_document
    monkeypatch.setattr(
        reproductions,
        "shipped_document",
        lambda options, root: read(options._replace(changes=CHANGES["ddgsd-cifar100"]), root=root),
    )
    options = ("--quick", "--out", str(out), "--data", str(strips), "--device", "auto")
    ended = kd_cache("reproduce", "ddgsd-cifar100", *options, "--json")
    assert ended.code == 0, ended.err
    written = json.loads((out / "ddgsd-cifar100-quick.json").read_text())
    assert written["rows"] == json.loads(ended.out)["rows"]
    assert str(out) not in (out / "ddgsd-cifar100-quick.md").read_text()
