"""`students` of a train file: what each may say, what all share, and every mistake in one line."""

from __future__ import annotations

import json

import pytest
import yaml
from support.command import kd_cache
from support.streams import MemoryStream, train_config, train_document

from cache_service.errors import ConfigError
from distill.config import TrainConfig
from distill.multi_student import OWN, load_students, split_students
from distill.trainer import train_students


def split(*students, **changes):
    return split_students(train_document("runs/x", students=[*students], **changes), where="t.yaml")


def test_one_student_without_a_name_is_the_file_itself():
    document = train_document("out")
    assert split_students(document, where="t.yaml") == {"": TrainConfig.model_validate(document)}


def test_a_list_of_one_is_a_folder_below():
    assert split({"name": "a"}) == {"a": train_config("runs/x/a")}


def test_what_a_student_says_replaces_the_files_section_as_a_whole():
    found = split(
        {"name": "a"},
        {"name": "b", "optimizer": {"name": "adamw", "lr": 0.01}, "seed": 3, "ema": None},
        ema=0.9,
        clip_grad_norm=2.0,
        optimizer__momentum=0.5,
    )
    shared = {"ema": 0.9, "clip_grad_norm": 2.0, "optimizer__momentum": 0.5}
    assert found["a"] == train_config("runs/x/a", **shared)
    other = {"optimizer": {"name": "adamw", "lr": 0.01}, "seed": 3, "ema": None}
    assert found["b"] == train_config("runs/x/b", clip_grad_norm=2.0, **other)


def test_nothing_need_be_said_twice_or_for_all():
    document = train_document("runs/x")
    own = {key: document.pop(key) for key in ("student", "method", "optimizer")}
    document["students"] = [{"name": "a", **own}, {"name": "b", **own, "seed": 1}]
    assert split_students(document, where="t.yaml")["a"] == train_config("runs/x/a")


@pytest.mark.parametrize(
    ("students", "says"),
    [
        ([], r"students: a list of one student or more, got \[\]"),
        (None, "students: a list of one student or more, got None"),
        ({"name": "a"}, "students: a list of one student or more"),
        (["a"], r"students\.0: a student is `name` and what it has of its own, got 'a'"),
        ([{}], r"students\.0\.name: 1 to 64 letters.*got None"),
        ([{"name": 7}], "got 7"),
        ([{"name": ""}], "got ''"),
        ([{"name": "../up"}], "got '../up'"),
        ([{"name": "a/b"}], "got 'a/b'"),
        ([{"name": "."}], r"got '\.'"),
        ([{"name": ".hidden"}], "got '.hidden'"),
        ([{"name": "checkpoint.pt"}], "got 'checkpoint.pt'"),
        ([{"name": "-a"}], "got '-a'"),
        ([{"name": "a b"}], "got 'a b'"),
        ([{"name": "a\n"}], "got 'a"),
        ([{"name": "a" * 65}], "got 'aaa"),
        ([{"name": "a"}, {"name": "a"}], r"students\.1\.name: a is taken"),
        ([{"name": "a"}, {"name": "A"}], r"students\.1\.name: A is taken"),
        (
            [{"name": "a", "epochs": 3}],
            r"students\.0\.epochs: is the same for all students\. Write epochs once, beside",
        ),
        ([{"name": "a", "out": "x"}], r"students\.0\.out: is the same for all"),
        (
            [{"name": "a", "metod": {"name": "ce"}}],
            r"students\.0\.metod: unknown key, did you mean method",
        ),
        (
            [{"name": "a"}, {"name": "b", "optimizer": {"name": "sgd", "lr": 0}}],
            r"t\.yaml, student b: optimizer\.lr: Input should be greater than 0, got 0",
        ),
        (
            [{"name": "a", "method": {"name": "kdd"}}],
            "t.yaml, student a: method: Input tag 'kdd'",
        ),
        ([{"name": "a", "student": {"model": ""}}], r"student a: student\.model: .*1 character"),
        ([{"name": "a", "student": None}], "student a: student: "),
        (
            [
                {"name": "a", "schedule": {"name": "cosine", "min_lr": 0.2}},
            ],
            "student a: schedule.min_lr=0.2 is above optimizer.lr=0.1",
        ),
    ],
)
def test_every_mistake_is_one_line_that_says_where(students, says):
    with pytest.raises(ConfigError, match=says) as refusal:
        split_students(train_document("runs/x", students=students), where="t.yaml")
    assert "\n" not in str(refusal.value)


def test_what_no_student_says_is_missing():
    document = train_document("out", students=[{"name": "a"}])
    del document["student"]
    with pytest.raises(ConfigError, match=r"student a: student: missing"):
        split_students(document, where="t.yaml")
    del document["out"]
    with pytest.raises(ConfigError, match=r"student a: .*out: missing"):
        split_students(document, where="t.yaml")


def test_a_value_of_one_student_is_set_by_its_place(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(train_document("out", students=[{"name": "a"}, {"name": "b"}])))
    found = load_students(path, ["students.1.seed=4", "epochs=5"])
    assert [(each.seed, each.epochs) for each in found.values()] == [(0, 5), (4, 5)]


def refused(configs, says):
    stream = MemoryStream(next(iter(configs.values()))) if configs else None
    with pytest.raises(ConfigError, match=says) as refusal:
        train_students(configs, stream=stream)
    assert refusal.value.exit_code == 2
    assert "\n" not in str(refusal.value)


def test_train_files_without_one_stream_are_refused(tmp_path):
    one = train_config(tmp_path / "a")
    refused({}, "there are no students")
    other = train_config(tmp_path / "b", batch_size=8)
    refused(
        {"a": one, "b": other}, "a and b have one stream, but batch_size is 4 for the one and 8"
    )
    other = train_config(f"{tmp_path}/c/../a", seed=1)
    refused({"a": one, "b": one}, "students a and b would write into the same folder")
    refused({"a": one, "b": other}, "students a and b would write into the same folder")


def test_peers_that_are_alike_in_everything_are_refused(tmp_path):
    configs = {
        name: train_config(tmp_path / name, method={"name": "peers"}, seed=seed)
        for name, seed in (("a", 0), ("b", 1), ("c", 0))
    }
    refused(configs, "students a and c learn from each other, but are alike .*a `seed` of its own")


def test_every_key_is_a_students_own_or_shared():
    assert set(OWN) < TrainConfig.model_fields.keys()
    assert {"dataset", "caches", "epochs", "batch_size", "accumulate", "out"}.isdisjoint(OWN)


DIGITS = {
    "dataset": {"name": "support.toys:patches", "args": {"num_samples": 24}},
    "augment": {"preset": "none", "size": 16},
    "student": {"model": "support.streams:plain_net"},
    "method": {"name": "ce"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "epochs": 1,
    "batch_size": 8,
    "workers": 0,
    "device": "cpu",
}


def write(path, **changes):
    path.write_text(yaml.safe_dump(DIGITS | changes))
    return str(path)


def test_the_command_trains_and_scores_them_all(tmp_path):
    scored = {"dataset": {"name": "support.toys:patches", "args": {"num_samples": 10}}}
    students = [{"name": "one"}, {"name": "other", "seed": 1}]
    out = str(tmp_path / "runs")
    file = write(tmp_path / "t.yaml", students=students, out=out, evaluate=scored)
    ended = kd_cache("train", file)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0] == f"{out}/one: 3 steps of ce"
    assert lines[1] == f"{out}/other: 3 steps of ce"
    assert lines[2].startswith("one    num_samples 10  top1 0.")
    assert lines[3].startswith("other  num_samples 10  top1 0.")
    assert kd_cache("evaluate", out, "--device", "cpu").out.splitlines() == lines[2:]


def test_the_commands_documents_name_each_student(tmp_path):
    scored = {"dataset": {"name": "support.toys:patches", "args": {"num_samples": 10}}}
    students = [{"name": "one"}, {"name": "other", "seed": 1}]
    out = str(tmp_path / "runs")
    file = write(tmp_path / "t.yaml", students=students, out=out, evaluate=scored)
    trained = json.loads(kd_cache("train", file, "--json").out)["students"]
    assert [(each["name"], each["out"], each["steps"]) for each in trained] == [
        ("one", f"{out}/one", 3),
        ("other", f"{out}/other", 3),
    ]
    scores = json.loads(kd_cache("evaluate", out, "--device", "cpu", "--json").out)["students"]
    assert scores == [{"name": each["name"], **each["evaluation"]} for each in trained]
    alone = json.loads(kd_cache("evaluate", f"{out}/one", "--device", "cpu", "--json").out)
    assert alone == trained[0]["evaluation"]


def test_a_mistake_ends_with_2_before_any_data_is_looked_for(tmp_path):
    file = write(
        tmp_path / "t.yaml",
        dataset={"name": "folder", "root": "/nowhere"},
        students=[{"name": "a"}, {"name": "b", "method": {"name": "kd", "temperature": 0}}],
        out=str(tmp_path / "runs"),
    )
    ended = kd_cache("train", file)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error[config]: {file}, student b: method.temperature: ")
    assert not (tmp_path / "runs").exists()
