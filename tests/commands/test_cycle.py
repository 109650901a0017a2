"""`kd-cache cycle`: each student teaches the next; mistakes come first; a kill changes nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.builds import build_document, record_toy, tree_bytes, write_file
from support.command import kd_cache

from cache_service.rows.reader import open_cache
from cli.experiments.cycle import load_cycle, run_cycle
from distill.checkpoint import CHECKPOINT_NAME, load_checkpoint

TOYS = {"name": "support.toys:patches", "args": {"num_samples": 80}}
HELD_OUT = {"name": "support.toys:patches", "args": {"num_samples": 30, "salt": 5}}
VIT = {
    "model": "distill.tokens:vit_tokens",
    "model_args": {
        "backbone": "vit_tiny_patch16_224",
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 2,
    },
}
PLAIN = {"preset": "none", "size": 16}
"""Of these toys the place in the image is the class, so nothing may be moved or mirrored."""
MLP = {
    "model": "cli.experiments.reproduce.networks:mlp",
    "model_args": {"side": 16, "hidden": [16]},
}
TEACHER = {"model": "support.toys:tiny_net", "allow_untrained": True}


def cycle_document(out, **changes):
    build = build_document("unused", dataset=TOYS, augment=PLAIN, scales=[1])
    document = {
        "out": str(out),
        "rounds": 2,
        "teachers": [TEACHER],
        "build": {key: value for key, value in build.items() if key not in {"cache", "teacher"}},
        "train": {
            "student": MLP,
            "optimizer": {"name": "adamw", "lr": 0.01},
            "epochs": 4,
            "batch_size": 16,
            "workers": 0,
            "device": "cpu",
            "evaluate": {"dataset": HELD_OUT},
        },
        # The first teacher knows nothing: who only learns from it is the worse student.
        "methods": [{"name": "hard", "alpha": 1.0}, {"name": "soft", "alpha": 0.1}],
    }
    for path, value in changes.items():
        here = document
        *parents, last = path.split("__")
        for parent in parents:
            here = here[parent]
        if value is None:
            del here[last]
        else:
            here[last] = value
    return document


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished cycle of three rounds, its file, and what it printed."""
    folder = tmp_path_factory.mktemp("cycle")
    file = write_file(folder / "cycle.yaml", cycle_document(folder / "out", rounds=3))
    ended = kd_cache("cycle", str(file), "--json")
    assert (ended.code, ended.err.count("Traceback")) == (0, 0), ended.err
    return file, folder / "out", json.loads(ended.out)


def test_teachers_grow_by_the_chosen_student_of_every_round(finished):
    _, out, document = finished
    rounds = document["rounds"]
    assert [len(each["teachers"]) for each in rounds] == [1, 2, 3]
    assert rounds[2]["teachers"][1:] == ["student 1", "student 2"]
    trained = load_checkpoint(out / "round-3" / "soft")
    recorded = [
        open_cache(str(out / name / "cache")) for name in ("teacher-1", "round-1", "round-2")
    ]
    assert trained["identity"]["caches"] == [cache.fingerprint for cache in recorded]
    assert not (out / "round-3" / "cache").exists()


@pytest.mark.parametrize("number", [1, 2])
def test_what_a_recorded_student_says_in_its_cache_it_says_again(finished, number):
    _, out, _ = finished
    ended = kd_cache(
        "verify", str(out / f"round-{number}" / "cache"), "--recompute", "24", "--json"
    )
    assert ended.code == 0, ended.err
    asked = json.loads(ended.out)["recompute"]
    assert (asked["num_views"], asked["views_equal"], asked["top1_agreement"]) == (24, 24, 1.0)


def test_of_several_methods_the_best_student_goes_on(finished):
    *_, document = finished
    for each in document["rounds"]:
        chosen = [student for student in each["students"] if student["chosen"]]
        assert [student["method"] for student in each["students"]] == ["hard", "soft"]
        assert len(chosen) == 1
        assert chosen[0]["top1"] == max(student["top1"] for student in each["students"])
        assert chosen[0]["top1"] > 0.4  # of five classes
    worse, better = document["rounds"][0]["students"]
    assert worse["top1"] < better["top1"]
    assert better["chosen"]


def test_the_table_is_written_as_page_and_json(finished):
    _, out, document = finished
    assert json.loads((out / "cycle.json").read_text()) == document
    lines = (out / "cycle.md").read_text().splitlines()
    assert sum(line.startswith(("| 1 | 1 |", "| 2 | 2 |", "| 3 | 3 |")) for line in lines) == 6


def test_the_same_command_again_trains_and_records_nothing(finished):
    file, out, document = finished
    before = {k: v for k, v in tree_bytes(out).items() if "/cache/" in k or CHECKPOINT_NAME in k}
    again = kd_cache("cycle", str(file), "--json")
    assert json.loads(again.out) == document
    assert all(line.endswith("before") for line in again.err.splitlines())
    after = tree_bytes(out)
    assert {key: after[key] for key in before} == before


def test_another_round_goes_on_from_those_that_are_there(finished, tmp_path):
    file, out, document = finished
    shutil.copytree(out, tmp_path / "out")
    longer = kd_cache(
        "cycle", str(file), "--json", "--set", f"out={tmp_path}/out", "--set", "rounds=4"
    )
    rounds = json.loads(longer.out)["rounds"]
    assert [each["round"] for each in rounds] == [1, 2, 3, 4]
    for before, now in zip(document["rounds"], rounds, strict=False):
        assert [each["top1"] for each in before["students"]] == [
            each["top1"] for each in now["students"]
        ]


@pytest.mark.parametrize("moment", ["recording student 1: teacher", "round 2: epoch 3"])
def test_stopped_and_resumed_it_ends_with_the_same_bytes(finished, tmp_path, moment):
    file, out, _ = finished
    config = load_cycle(file, [f"out={tmp_path}/out", "rounds=2"])
    said = []

    def stop(line):
        if line.startswith(moment):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cycle(config, where="cycle.yaml", on_message=stop)
    run_cycle(config, where="cycle.yaml", on_message=said.append)
    assert not all(line.endswith("before") for line in said)
    _assert_same_runs(tmp_path / "out", out)


@pytest.mark.faults
def test_killed_at_any_moment_it_ends_with_the_same_bytes(finished, tmp_path):
    file, out, _ = finished
    words = ["-c", "from cli.main import run; run()", "cycle", str(file)]
    words += ["--set", f"out={tmp_path}/out", "--set", "rounds=2"]
    for wanted in ("round-1/soft/metrics.jsonl", "round-1/cache", "round-2/hard/checkpoint.pt"):
        child = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL)
        while child.poll() is None and not (tmp_path / "out" / wanted).exists():
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert (
        subprocess.run([sys.executable, *words], check=False, capture_output=True).returncode == 0
    )
    _assert_same_runs(tmp_path / "out", out)


def _assert_same_runs(found, expected):
    """The first two rounds: checkpoints, recordings and scores."""
    mine, theirs = (json.loads((each / "cycle.json").read_text()) for each in (found, expected))
    text = json.dumps(theirs["rounds"][:2]).replace(str(expected), str(found))
    assert json.dumps(mine["rounds"]) == text
    after, before = tree_bytes(found), tree_bytes(expected)
    # The root of a cache says where its teacher's checkpoint lies: in another folder here.
    rows = [key for key in before if "/cache/" in key and not key.endswith("cache/zarr.json")]
    for key in rows:
        assert key.startswith("round-2") or after[key] == before[key], key
    for run in ("round-1/soft", "round-2/hard"):
        one, other = (load_checkpoint(each / run)["model"] for each in (found, expected))
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_only_the_newest_teachers_are_kept_where_that_is_asked_for(tmp_path):
    file = write_file(
        tmp_path / "cycle.yaml",
        cycle_document(tmp_path / "out", keep=1, methods=[{"name": "kd", "alpha": 0.3}]),
    )
    ended = kd_cache("cycle", str(file))
    assert ended.code == 0, ended.err
    assert "| 2 | 1 | student 1 | kd |" in ended.out


def test_tokens_grow_with_the_teachers_and_a_recorded_cache_may_be_one_of_them(tmp_path):
    recorded = record_toy(
        str(tmp_path / "given"), dataset=TOYS, augment=PLAIN, scales=[1], teacher=TEACHER
    )
    file = write_file(
        tmp_path / "cycle.yaml",
        cycle_document(
            tmp_path / "out",
            teachers=[recorded.url, {**TEACHER, "model_args": {"width": 10}}],
            train__student=VIT,
            train__epochs=8,
            # The teachers know nothing, and their heads would outvote the label's.
            methods=[{"name": "hard", "heads": "each", "alpha": 0.0}],
            tokens=True,
        ),
    )
    ended = kd_cache("cycle", str(file), "--json")
    assert ended.code == 0, ended.err
    tokens = [
        load_checkpoint(tmp_path / "out" / f"round-{number}" / "hard")["config"]["student"]
        for number in (1, 2)
    ]
    assert [each["model_args"]["num_tokens"] for each in tokens] == [2, 3]


WRONG = {
    "rounds": ({"rounds": 0}, "rounds"),
    "many rounds": ({"rounds": 101}, "rounds"),
    "no teachers": ({"teachers": []}, "teachers"),
    "no methods": ({"methods": []}, "methods"),
    "keep nothing": ({"keep": 0}, "keep"),
    "keep a word": ({"keep": "some"}, "keep"),
    "cache in build": ({"build__cache": "c"}, "cache is set by the cycle"),
    "method in train": ({"train__method": {"name": "kd"}}, "method is set by the cycle"),
    "no evaluate": ({"train__evaluate": None}, "evaluate is missing"),
    "build key": ({"build__sedes": "0:2"}, "build: sedes: unknown key"),
    "no seeds": ({"build__seeds": None}, "build"),
    "train key": ({"train__epoch": 3}, "method hard: epoch: unknown key"),
    "no student": ({"train__student": None}, "student: missing"),
    "unknown method": ({"methods": [{"name": "telepathy"}]}, "method"),
    "teacher key": ({"teachers": [{**TEACHER, "colour": 1}]}, "colour"),
    "one teacher only": ({"methods": [{"name": "kd"}]}, "learns from one teacher"),
    "tokens without heads": ({"tokens": True}, "num_tokens"),
    "heads without tokens": (
        {"methods": [{"name": "soft", "heads": "each"}]},
        "no heads for teachers",
    ),
    "no cells to record": (
        {"train__student": {**VIT}, "tokens": True, "build__scales": [1, 2]},
        "",
    ),
    "no such model": ({"train__student": {"model": "resnet_of_nobody"}}, "resnet_of_nobody"),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_mistake_is_one_line_before_anything_is_written(name, tmp_path):
    changes, told = WRONG[name]
    out = tmp_path / "out"
    file = write_file(tmp_path / "cycle.yaml", cycle_document(out, **changes))
    ended = kd_cache("cycle", str(file))
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert len(ended.err.splitlines()) == 1
    assert told in ended.err
    assert not out.exists()


def test_a_recorded_teacher_is_what_it_says_and_not_what_is_recorded_next(tmp_path):
    recorded = record_toy(str(tmp_path / "dense"), dataset=TOYS, augment=PLAIN, scales=[1])
    changes = {
        "rounds": 1,
        "teachers": [recorded.url],
        "train__epochs": 1,
        "methods": [{"name": "logits"}],
        # Of students, of whom this cycle records none.
        "build__codec": {"kind": "topk", "k": 3},
    }
    out = tmp_path / "out"
    file = write_file(tmp_path / "cycle.yaml", cycle_document(out, **changes))
    assert kd_cache("cycle", str(file)).code == 0
    changes |= {"rounds": 2, "keep": 1}
    file = write_file(tmp_path / "cycle.yaml", cycle_document(tmp_path / "other", **changes))
    ended = kd_cache("cycle", str(file))
    assert ended.code == 2
    assert "student 1 keeps only the largest" in ended.err


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ({"augment": {"preset": "cifar", "size": 16}}, 3, "recorded with another recipe"),
        ({"dataset": HELD_OUT}, 3, "recorded from dataset"),
        ({"seeds": "0:1"}, 4, "1:2 were asked for"),
        (None, 2, "no cache at"),
    ],
)
def test_a_recorded_teacher_of_other_views_is_refused_before_another_is_recorded(
    tmp_path, changes, code, told
):
    url = str(tmp_path / "recorded")
    if changes is not None:
        record_toy(url, **{"dataset": TOYS, "augment": PLAIN, "scales": [1]} | changes)
    out = tmp_path / "out"
    document = cycle_document(out, teachers=[TEACHER, url], build__seeds="0:2")
    ended = kd_cache("cycle", str(write_file(tmp_path / "cycle.yaml", document)))
    assert (ended.code, len(ended.err.splitlines())) == (code, 1), ended.err
    assert told in ended.err
    assert not out.exists()
