"""The MNIST experiments say what the paper says, and the committed tables are made with them."""

from __future__ import annotations

import pytest
from support.command import kd_cache
from support.pages import ROOT

from cache_service.config import parse_yaml
from cache_service.format.recipe import Mixup, RandomAffine
from cli.experiments.reproduce.shipped import Options, shipped_document, shipped_experiment

NAMES = ("hinton-mnist", "omitted-three")
VIEWS = {"labels": "still", "soft": "still", "mixed-soft": "mixed", "mixed-labels": "mixed"}


def experiment(name="hinton-mnist", *, quick=False):
    options = Options(name=name, out="out", data="data", runs=3, quick=quick, on_message=print)
    return shipped_experiment(shipped_document(options, root="data"), options)


def train_file(config, name, seed=0):
    variant = next(each for each in config.variants() if each.name == name)
    return config.train_config(variant, seed, where="test")


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_has_the_papers_jitter_and_max_norm_and_what_else_the_table_names(name):
    config = experiment(name).teacher_config("teacher", where="test")
    assert config.student.model_args == {
        "hidden": [1200, 1200],
        "drop_input": 0.0,
        "drop_hidden": 0.1,
        "max_norm": 4.0,
    }
    jitter, affine = config.augment.ops
    assert (config.augment.size, jitter.op, jitter.padding) == (28, "pad_crop", 2)
    assert affine == RandomAffine(degrees=12.0, scale=(0.9, 1.1))
    assert config.method.name == "ce"


@pytest.mark.parametrize(("name", "omit"), [("hinton-mnist", None), ("omitted-three", [3])])
def test_the_papers_transfer_set_is_unmoved_and_the_student_plain(name, omit):
    config = experiment(name)
    build, student = config.build_config("still", where="test"), train_file(config, "soft", 2)
    assert [op.op for op in build.augment.ops] == ["pad_crop"]
    assert build.augment.ops[0].padding == 0
    assert build.dataset.args.get("omit") == omit
    assert student.student.model_args == {"hidden": [800, 800]}
    assert (student.method.name, student.method.temperature, student.seed) == ("kd", 20, 2)
    assert student.dataset == build.dataset
    assert student.evaluate.dataset.args == {"part": "test"}


@pytest.mark.parametrize("views", ["still", "mixed"])
def test_students_on_labels_and_on_soft_targets_see_the_same_views_in_the_same_order(views):
    config = experiment()
    build = config.build_config(views, where="test")
    labels, soft = (train_file(config, name) for name, seen in VIEWS.items() if seen == views)
    if labels.caches:
        labels, soft = soft, labels
    assert (labels.augment, labels.seeds) == (build.augment, build.seeds)
    assert soft.seeds == build.seeds
    assert [cache.url for cache in soft.caches] == [build.cache]
    assert (labels.epochs, labels.batch_size) == (soft.epochs, soft.batch_size)
    assert labels.student == soft.student


@pytest.mark.parametrize("name", NAMES)
def test_mixed_views_are_blends_of_those_that_the_teacher_was_trained_on_and_none_comes_twice(name):
    config = experiment(name)
    teacher = config.teacher_config("teacher", where="test")
    build = config.build_config("mixed", where="test")
    assert build.augment.ops == (*teacher.augment.ops, Mixup(alpha=0.4))
    assert len(build.seeds) == train_file(config, "mixed-soft").epochs


@pytest.mark.parametrize("name", NAMES)
def test_the_quick_form_differs_in_lengths_alone_and_lies_elsewhere(name):
    full, quick = experiment(name), experiment(name, quick=True)
    assert full.out != quick.out

    def without_lengths(config):
        settings = config.settings()
        lengths = [settings["teachers"]["teacher"].pop("epochs")]
        lengths += [len(config.build_config(each, where="t").seeds) for each in config.recordings]
        lengths += [entry["train"].pop("epochs") for entry in settings["methods"].values()]
        for recording in settings["recordings"].values():
            del recording["seeds"]
        return settings, lengths

    (full_settings, full_lengths), (quick_settings, quick_lengths) = map(
        without_lengths, (full, quick)
    )
    assert full_settings == quick_settings
    assert all(a > b for a, b in zip(full_lengths, quick_lengths, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_both_tables_have_the_same_teacher(name):
    teachers = [experiment(each).settings()["teachers"] for each in NAMES]
    assert teachers[0] == teachers[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_table_was_made_with_the_settings_that_the_program_has(name):
    page = (ROOT / "docs" / "results" / f"{name}.md").read_text()
    settings = page.partition("## Settings\n\n```yaml\n")[2].partition("```")[0]
    assert parse_yaml(settings, where=name) == experiment(name).settings()


def test_no_seed_is_refused():
    assert kd_cache("reproduce", "hinton-mnist", "--seeds", "0").code == 2
