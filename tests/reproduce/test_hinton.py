"""The files of the MNIST reproductions say what the paper says, and bad settings are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from support.command import kd_cache
from support.pages import ROOT

from cache_service.format.recipe import Mixup, RandomAffine
from cache_service.recording.config import BuildConfig
from cache_service.yamltext import parse_yaml
from cli.experiments.reproduce.hinton import (
    FULL,
    QUICK,
    HintonSettings,
    Moves,
    Transfer,
    build_document,
    student_document,
    teacher_document,
)
from cli.experiments.reproduce.order import Order
from distill.config import TrainConfig

ORDER = Order(out="out", data="data", seeds=1, quick=False, say=lambda line: None)


def test_the_teacher_has_the_papers_jitter_and_max_norm_and_what_else_the_table_tells():
    config = TrainConfig.model_validate(teacher_document(FULL, ORDER))
    args = config.student.model_args
    assert args["hidden"] == [1200, 1200]
    assert (args["drop_input"], args["drop_hidden"]) == (FULL.drop_input, FULL.drop_hidden)
    assert args["max_norm"] == FULL.max_norm
    jitter, affine = config.augment.ops
    assert (config.augment.size, jitter.op, jitter.padding) == (28, "pad_crop", 2)
    assert affine == RandomAffine(degrees=FULL.moves.degrees, scale=(0.9, 1.1))
    assert config.method.name == "ce"


def test_the_transfer_set_is_unmoved_and_the_student_plain():
    build = BuildConfig.model_validate(
        build_document(FULL, ORDER, FULL.unmoved, cache="c", omit=[3])
    )
    assert [op.op for op in build.augment.ops] == ["pad_crop"]
    assert build.augment.ops[0].padding == 0
    assert build.dataset.args["omit"] == [3]
    student = TrainConfig.model_validate(
        student_document(FULL, ORDER, FULL.unmoved, seed=2, out="o", cache="c", omit=[3])
    )
    assert student.student.model_args == {"hidden": [800, 800]}
    assert (student.method.name, student.method.temperature, student.seed) == ("kd", 20, 2)
    assert student.dataset == build.dataset
    assert student.evaluate.dataset.args == {"part": "test"}


@pytest.mark.parametrize("name", ["mixed", "omitted", "unmoved"])
def test_students_on_labels_and_on_soft_targets_see_the_same_views_in_the_same_order(name):
    transfer = getattr(FULL, name)
    build = BuildConfig.model_validate(build_document(FULL, ORDER, transfer, cache="c"))
    documents = (
        student_document(FULL, ORDER, transfer, seed=0, out="o"),
        student_document(FULL, ORDER, transfer, seed=0, out="o", cache="c"),
    )
    labels, soft = (TrainConfig.model_validate(document) for document in documents)
    assert (labels.augment, labels.seeds) == (build.augment, build.seeds)
    assert (labels.epochs, labels.batch_size) == (soft.epochs, soft.batch_size)
    assert labels.student == soft.student


@pytest.mark.parametrize("name", ["mixed", "omitted"])
def test_mixed_views_are_blends_of_those_that_the_teacher_was_trained_on_and_none_comes_twice(name):
    transfer = getattr(FULL, name)
    teacher = TrainConfig.model_validate(teacher_document(FULL, ORDER))
    build = BuildConfig.model_validate(build_document(FULL, ORDER, transfer, cache="c"))
    assert build.augment.ops == (*teacher.augment.ops, Mixup(alpha=0.4))
    assert transfer.recorded == transfer.epochs


def test_the_quick_form_differs_in_lengths_alone_and_lies_elsewhere():
    lengths = {"epochs", "recorded"}
    transfers = {"unmoved", "mixed", "omitted"}
    others = {"teacher_epochs", *transfers}
    assert FULL.model_dump(exclude=others) == QUICK.model_dump(exclude=others)
    assert FULL.teacher_epochs > QUICK.teacher_epochs
    for name in sorted(transfers):
        full, quick = getattr(FULL, name), getattr(QUICK, name)
        assert full.model_dump(exclude=lengths) == quick.model_dump(exclude=lengths)
        assert all(getattr(full, length) > getattr(quick, length) for length in lengths)
    assert ORDER.folder("x") != ORDER._replace(quick=True).folder("x")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("teacher_hidden", [0]),
        ("teacher_epochs", 0),
        ("teacher_batch", 0),
        ("drop_input", 1.0),
        ("drop_hidden", -0.1),
        ("max_norm", 0),
        ("student_hidden", [0]),
        ("student_batch", 0),
        ("temperature", 0),
        ("workers", -1),
    ],
)
def test_settings_out_of_bounds_are_refused(setting, value):
    with pytest.raises(ValidationError, match=setting):
        HintonSettings.model_validate({setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mixup", 0),
        ("epochs", 0),
        ("recorded", 0),
        ("alpha", 0),
        ("alpha", 1.1),
        ("soft_clip", 0),
    ],
)
def test_transfer_sets_out_of_bounds_are_refused(setting, value):
    with pytest.raises(ValidationError, match=setting):
        Transfer.model_validate(FULL.mixed.model_dump() | {setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("jitter", -1), ("degrees", -1), ("degrees", 181), ("zoom", -0.1), ("zoom", 0.9)],
)
def test_moves_out_of_bounds_are_refused(setting, value):
    with pytest.raises(ValidationError, match=setting):
        Moves.model_validate({setting: value})


@pytest.mark.parametrize("name", ["hinton-mnist", "omitted-three"])
def test_the_committed_table_was_made_with_the_settings_that_the_code_has(name):
    page = (ROOT / "docs" / "results" / f"{name}.md").read_text()
    settings = page.partition("## Settings\n\n```yaml\n")[2].partition("```")[0]
    assert HintonSettings.model_validate(parse_yaml(settings, where=name)) == FULL


def test_no_seed_is_refused():
    assert kd_cache("reproduce", "hinton-mnist", "--seeds", "0").code == 2
