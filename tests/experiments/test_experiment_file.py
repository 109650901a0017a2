"""An experiment file becomes ordinary train and build files; mistakes are one line."""

from __future__ import annotations

import copy

import pytest
from support.pages import ROOT

from cache_service.config import validate_config
from cache_service.errors import ConfigError
from cli.experiments.experiment_check import check_experiment
from cli.experiments.experiment_file import ExperimentConfig, load_experiment, merge_documents

DOCUMENT = {
    "out": "o",
    "runs": 2,
    "dataset": {"name": "digits"},
    "evaluate": {"dataset": {"name": "digits", "split": "test"}},
    "augment": {"preset": "none", "size": 8},
    "train": {"optimizer": {"name": "sgd", "lr": 0.1}, "epochs": 3, "batch_size": 16},
    "teachers": {
        "big": {"student": {"model": "resnet20", "mean": [0.5] * 3, "std": [0.5] * 3}, "epochs": 9}
    },
    "recordings": {
        "own": {"teacher": "big", "seeds": "0:3", "augment": {"preset": "cifar", "size": 8}},
        "other": "s3://bucket/other",
    },
    "students": {"small": {"model": "resnet8x4"}},
    "methods": {
        "labels": {"method": {"name": "ce"}, "views": "own"},
        "kd": {"method": {"name": "kd"}, "recordings": ["own"], "train": {"epochs": 5}},
        "soft": {"name": "soft"},
    },
    "published": {"big": 70.5, "kd": [71, 72.5]},
    "titles": {"kd": "KD of one"},
    "quick": {"runs": 1, "train": {"epochs": 1}},
}


def changed(**changes):
    return merge_documents(DOCUMENT, changes)


@pytest.fixture
def config():
    return validate_config(ExperimentConfig, DOCUMENT, where="file")


def train_file(config, name, seed=0):
    variant = next(each for each in config.variants() if each.name == name)
    return config.train_config(variant, seed, where="file")


def test_a_teacher_learns_from_labels_and_a_recording_names_what_it_became(config):
    teacher = config.teacher_config("big", where="file")
    assert (teacher.method.name, teacher.epochs, teacher.out) == ("ce", 9, "o/teachers/big")
    build = config.build_config("own", where="file")
    assert build.teacher.model == "resnet20"
    assert build.teacher.checkpoint == "o/teachers/big/student.safetensors"
    assert build.teacher.mean == (0.5, 0.5, 0.5)
    assert (build.cache, build.augment.preset) == ("o/recordings/own/cache", "cifar")
    assert config.build_config("other", where="file") is None


def test_a_method_learns_from_the_recordings_it_names_and_by_default_from_all(config):
    kd, soft = train_file(config, "kd"), train_file(config, "soft")
    assert [cache.url for cache in kd.caches] == ["o/recordings/own/cache"]
    assert [cache.url for cache in soft.caches] == ["o/recordings/own/cache", "s3://bucket/other"]
    assert (kd.epochs, soft.epochs) == (5, 3)
    assert kd.seeds == (0, 1, 2)


def test_a_method_without_a_teacher_may_see_the_views_of_a_recording(config):
    labels, build = train_file(config, "labels"), config.build_config("own", where="file")
    assert labels.caches == ()
    assert (labels.augment, labels.seeds) == (build.augment, build.seeds)


def test_every_run_has_a_seed_and_a_folder_of_its_own(config):
    runs = [train_file(config, "kd", seed) for seed in range(config.runs)]
    assert [run.seed for run in runs] == [0, 1]
    assert [run.out for run in runs] == [f"o/runs/small/kd/seed-{seed}" for seed in (0, 1)]


def test_a_recording_of_other_data_is_what_its_students_see(config):
    omitted = {"name": "digits", "args": {"part": 1}}
    other = validate_config(
        ExperimentConfig, changed(recordings={"own": {"dataset": omitted}}), where="file"
    )
    assert train_file(other, "kd").dataset.args == {"part": 1}
    assert train_file(other, "labels").dataset.args == {"part": 1}
    assert train_file(config, "kd").dataset.args == {}


def test_rows_of_several_students_are_named_by_student_and_method():
    document = changed(
        students={"tiny": {"model": "resnet8"}}, methods={"kd": {"students": ["tiny"]}}
    )
    document |= {"published": {"tiny/kd": 3}, "titles": {}}
    config = validate_config(ExperimentConfig, document, where="file")
    names = [variant.name for variant in config.variants()]
    assert names == ["small/labels", "small/soft", "tiny/labels", "tiny/kd", "tiny/soft"]
    assert config.title_of("tiny/kd") == "tiny, kd"


def test_settings_are_the_file_without_prose_and_folders(config):
    settings = config.settings()
    assert "published" not in settings
    assert settings["recordings"]["own"]["seeds"] == "0:3"
    document = copy.deepcopy(DOCUMENT) | {"out": "elsewhere", "title": "Another"}
    document["dataset"]["root"] = "data"
    assert validate_config(ExperimentConfig, document, where="file").settings() == settings


def test_paths_of_recordings_and_teachers_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    (teacher, *_), (recording, *_) = DOCUMENT["teachers"], DOCUMENT["recordings"]
    document = changed(
        out="~/e",
        teachers={**DOCUMENT["teachers"], teacher: {**DOCUMENT["teachers"][teacher], "out": "~/t"}},
        recordings={
            **DOCUMENT["recordings"],
            recording: {**DOCUMENT["recordings"][recording], "cache": "~/c"},
            "elsewhere": "~/r",
        },
    )
    config = validate_config(ExperimentConfig, document, where="file")
    assert (config.out, config.teacher_out(teacher)) == ("/home/ann/e", "/home/ann/t")
    assert config.cache_of(recording) == "/home/ann/c"
    assert config.cache_of("elsewhere") == "/home/ann/r"
    monkeypatch.delenv("NOWHERE", raising=False)
    document = changed(recordings={"x": {"cache": "$NOWHERE"}})
    with pytest.raises(ConfigError, match=r"recordings\.x: cache: the environment variable"):
        validate_config(ExperimentConfig, document, where="file")


def test_the_quick_form_changes_what_it_names_and_set_has_the_last_word(tmp_path):
    path = ROOT / "examples" / "digits.experiment.yaml"
    full, quick = load_experiment(path), load_experiment(path, ["runs=2"], quick=True)
    assert (full.runs, full.train["epochs"]) == (3, 4)
    assert (quick.runs, quick.train["epochs"]) == (2, 2)
    assert quick.train["optimizer"] == full.train["optimizer"]


def test_a_file_without_a_quick_form_says_so(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("title: Some\n")
    with pytest.raises(ConfigError, match="has no quick form"):
        load_experiment(path, quick=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": 0}, "runs: Input should be greater than or equal to 1"),
        ({"runs": 101}, "runs: Input should be less than or equal to 100"),
        ({"figure": "loss"}, "figure"),
        ({"titel": "x"}, "titel: unknown key, did you mean title"),
        ({"train": {"seed": 3}}, "seed is set by the experiment"),
        ({"students": {"a/b": {}}}, "students"),
        ({"methods": {"kd": {"recordings": ["none"]}}}, "recording 'none' is not in this file"),
        ({"methods": {"kd": {"students": ["none"]}}}, "student 'none' is not in this file"),
        ({"methods": {"kd": {"views": "own"}}}, "recordings and views: give one"),
        ({"methods": {"labels": {"views": "other"}}}, "views of other, which is not recorded"),
        ({"recordings": {"own": {"teacher": "none"}}}, "teacher 'none' is not in this file"),
        ({"published": {"none": 1}}, "published: row 'none' is not in this file"),
        ({"titles": {"none": "x"}}, "titles: row 'none' is not in this file"),
        ({"methods": {"big": {"name": "ce"}}}, "a teacher and a method have the same name"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(changes, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")) as refusal:
        validate_config(ExperimentConfig, changed(**changes), where="file")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"epoch": 3}}, "file: teacher big: epoch: unknown key"),
        ({"recordings": {"own": {"sedes": "0:2"}}}, "file: recording own: sedes: unknown key"),
        ({"methods": {"kd": {"method": {"name": "telepathy"}}}}, "file: kd: method"),
    ],
)
def test_a_mistake_in_a_part_names_the_part(changes, message):
    config = validate_config(ExperimentConfig, changed(**changes), where="file")
    with pytest.raises(ConfigError, match=message):
        check_experiment(config, where="file")
