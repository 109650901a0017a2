"""`kd-cache experiment`: a table over methods and seeds; it resumes; failures stay in the table."""

from __future__ import annotations

import json
import re

import pytest
from support.builds import tree_bytes, write_file
from support.command import kd_cache
from support.html_page import Page

from cli.experiments.experiment_file import load_experiment, merge_documents
from cli.experiments.runner import run_experiment
from distill.checkpoint import CHECKPOINT_NAME, load_checkpoint

MLP = "cli.experiments.reproduce.networks:mlp"
TOYS = {"name": "support.toys:patches", "args": {"num_samples": 80}}
HELD_OUT = {"name": "support.toys:patches", "args": {"num_samples": 30, "salt": 5}}
DOCUMENT = {
    "title": "Toys",
    "runs": 2,
    "dataset": TOYS,
    "evaluate": {"dataset": HELD_OUT},
    # Of these toys the place in the image is the class, so nothing may be moved or mirrored.
    "augment": {"preset": "none", "size": 16},
    "train": {
        "optimizer": {"name": "adamw", "lr": 0.01},
        "epochs": 3,
        "batch_size": 16,
        "workers": 0,
        "device": "cpu",
    },
    "teachers": {
        "teacher": {"student": {"model": MLP, "model_args": {"side": 16, "hidden": [32]}}}
    },
    "recordings": {"toys": {"teacher": "teacher", "seeds": "0:2", "batch_size": 16}},
    "students": {"small": {"model": MLP, "model_args": {"side": 16, "hidden": [8]}}},
    "methods": {"labels": {"name": "ce"}, "kd": {"name": "kd"}},
    "published": {"kd": 90},
    "quick": {"train": {"epochs": 1}},
}


def write_experiment(folder, **changes):
    return write_file(folder / "toys.yaml", merge_documents(DOCUMENT, changes))


def kept(out):
    files = tree_bytes(out).items()
    return {key: value for key, value in files if "/cache/" in key or CHECKPOINT_NAME in key}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    file = write_experiment(folder)
    ended = kd_cache("experiment", str(file), "--out", str(folder / "out"), "--json")
    assert ended.code == 0, ended.err
    return file, folder / "out", json.loads(ended.out)


def test_every_method_has_a_row_with_mean_and_deviation_over_its_runs(finished):
    _, _, document = finished
    rows = {row["what"]: row for row in document["rows"]}
    assert list(rows) == ["teacher", "labels", "kd"]
    for name in ("labels", "kd"):
        values = [run["last"] for run in rows[name]["runs"]]
        assert [run["seed"] for run in rows[name]["runs"]] == [0, 1]
        assert rows[name]["mean"] == pytest.approx(sum(values) / 2)
        assert rows[name]["standard_deviation"] == pytest.approx(
            abs(values[0] - values[1]) / 2**0.5
        )
    assert rows["kd"]["published"] == 90
    assert rows["teacher"]["mean"] > 40  # of five classes


def test_page_json_and_report_are_written(finished):
    _, out, document = finished
    assert document["written"] == {
        "markdown": str(out / "experiment.md"),
        "json": str(out / "experiment.json"),
        "report": str(out / "experiment.html"),
    }
    assert json.loads((out / "experiment.json").read_text())["rows"] == document["rows"]
    assert (out / "experiment.md").read_text().startswith("# Toys\n")


def test_the_report_needs_nothing_else_and_shows_every_row(finished):
    _, out, _ = finished
    html = (out / "experiment.html").read_text()
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?:", html)
    assert [text for text in page.text_of("th") if text in {"teacher", "labels", "kd"}] == [
        "teacher",
        "labels",
        "kd",
    ]
    labels = [svg["aria-label"] for svg in page.all("svg") if svg.get("role") == "img"]
    assert any(text.startswith("Mean over runs. teacher: ") for text in labels)
    assert any(text.startswith("Test accuracy after each epoch.") for text in labels)


def test_students_of_one_recording_share_its_stream(finished):
    _, out, _ = finished
    runs = [load_checkpoint(out / f"runs/small/{name}/seed-0") for name in ("labels", "kd")]
    assert runs[0]["identity"]["caches"] == runs[1]["identity"]["caches"]
    assert len(runs[0]["identity"]["caches"]) == 1


def test_the_same_command_again_trains_and_records_nothing(finished):
    file, out, document = finished
    before = kept(out)
    again = kd_cache("experiment", str(file), "--out", str(out), "--json")
    assert json.loads(again.out)["rows"] == document["rows"]
    assert all(line.endswith("before") for line in again.err.splitlines()), again.err
    assert kept(out) == before


def test_a_third_run_joins_those_that_are_there(finished):
    file, out, document = finished
    more = kd_cache("experiment", str(file), "--out", str(out), "--json", "--set", "runs=3")
    for before, now in zip(document["rows"][1:], json.loads(more.out)["rows"][1:], strict=True):
        assert now["runs"][:2] == before["runs"]
        assert len(now["runs"]) == 3


def test_the_quick_form_lies_in_a_folder_of_its_own(finished):
    file, out, _ = finished
    ended = kd_cache("experiment", str(file), "--out", str(out), "--quick")
    assert ended.code == 0, ended.err
    assert "Quick form" in ended.out
    assert load_checkpoint(out / "quick/runs/small/kd/seed-0")["config"]["epochs"] == 1


def test_stopped_and_resumed_it_has_the_same_figures(finished, tmp_path):
    file, _, document = finished
    config = load_experiment(file).model_copy(update={"out": str(tmp_path / "out")})
    messages = []

    def stop(line):
        if "labels seed 0" in line and "epoch 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, where="toys", on_message=stop)
    result = run_experiment(config, where="toys", on_message=messages.append)
    assert [result.row(name).values for name in ("labels", "kd")] == [
        tuple(run["last"] for run in row["runs"]) for row in document["rows"][1:]
    ]
    assert not any("epoch 1 of 3: labels" in line for line in messages)


def test_a_run_that_diverges_is_a_row_with_its_reason_and_the_others_go_on(tmp_path):
    wild = {"model": "support.strokes:overflowing", "model_args": {"side": 16}}
    document = merge_documents(DOCUMENT, {"runs": 1, "students": {"wild": wild}})
    file = write_file(tmp_path / "toys.yaml", document | {"published": {}})
    ended = kd_cache("experiment", str(file), "--out", str(tmp_path / "out"), "--json")
    assert ended.code == 0, ended.err
    rows = {row["what"]: row for row in json.loads(ended.out)["rows"]}
    assert "is not finite" in rows["wild, kd"]["runs"][0]["failure"]
    assert rows["wild, kd"]["mean"] is None
    assert rows["small, kd"]["mean"] is not None
    assert "is not finite" in (tmp_path / "out" / "experiment.html").read_text()


def test_without_a_usable_teacher_its_students_are_failures_and_others_go_on(tmp_path):
    idle = {"optimizer": {"name": "sgd", "lr": 1e-9}, "epochs": 1}
    document = merge_documents(DOCUMENT, {"runs": 1, "teachers": {"teacher": idle}})
    document["methods"]["labels"] = {"method": {"name": "ce"}, "views": "toys"}
    file = write_file(tmp_path / "toys.yaml", document)
    ended = kd_cache("experiment", str(file), "--out", str(tmp_path / "out"), "--json")
    rows = {row["what"]: row for row in json.loads(ended.out)["rows"]}
    assert rows["kd"]["runs"][0]["failure"].startswith("no recording: teacher ")
    assert rows["labels"]["mean"] is not None


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"methods": {"kd": {"alpha": 2}}}, 2, "alpha"),
        ({"methods": {"sd": {"name": "sd-kd", "scales": [1, 2]}}}, 2, "scales"),
        ({"students": {"small": {"model": "resnet_of_nobody"}}}, 2, "resnet_of_nobody"),
        ({"recordings": {"other": "nowhere"}}, 2, "no cache at"),
        ({"dataset": {"args": {"num_samples": 0}}}, 2, ""),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(changes, code, message, tmp_path):
    file = write_experiment(tmp_path, **changes)
    ended = kd_cache("experiment", str(file), "--out", str(tmp_path / "out"))
    assert (ended.code, ended.out) == (code, ""), ended.err
    assert len(ended.err.splitlines()) == 1
    assert message in ended.err
    assert not (tmp_path / "out").exists()
