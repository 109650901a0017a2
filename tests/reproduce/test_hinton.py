"""The files of the MNIST reproductions say what the paper says, and bad settings are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from support.command import kd_cache

from cache_service.build.config import BuildConfig
from cli.reproduce.hinton import (
    FULL,
    QUICK,
    HintonSettings,
    build_document,
    student_document,
    teacher_document,
)
from cli.reproduce.order import Order
from distill.config import TrainConfig

ORDER = Order(out="out", data="data", seeds=1, quick=False, say=lambda line: None)


def test_the_teacher_is_the_papers_with_dropout_jitter_and_max_norm():
    config = TrainConfig.model_validate(teacher_document(FULL, ORDER))
    args = config.student.model_args
    assert args["hidden"] == [1200, 1200]
    assert (args["drop_input"], args["drop_hidden"]) == (0.2, 0.5)
    assert args["max_norm"] == FULL.max_norm
    (jitter,) = config.augment.ops
    assert (config.augment.size, jitter.op, jitter.padding) == (28, "pad_crop", 2)
    assert config.method.name == "ce"


def test_the_transfer_set_is_unmoved_and_the_student_plain():
    build = BuildConfig.model_validate(build_document(FULL, ORDER, cache="c", omit=[3]))
    assert build.augment.preset == "none"
    assert build.dataset.args["omit"] == [3]
    student = TrainConfig.model_validate(
        student_document(FULL, ORDER, seed=2, out="o", cache="c", omit=[3])
    )
    assert student.student.model_args == {"hidden": [800, 800]}
    assert (student.method.name, student.method.temperature, student.seed) == ("kd", 20, 2)
    assert student.dataset == build.dataset
    assert student.evaluate.dataset.args == {"part": "test"}


def test_students_on_labels_and_on_soft_targets_see_the_same_views_in_the_same_order():
    build = BuildConfig.model_validate(build_document(FULL, ORDER, cache="c"))
    labels = TrainConfig.model_validate(student_document(FULL, ORDER, seed=0, out="o"))
    soft = TrainConfig.model_validate(student_document(FULL, ORDER, seed=0, out="o", cache="c"))
    assert (labels.augment, labels.seeds) == (build.augment, build.seeds)
    assert (labels.epochs, labels.batch_size) == (soft.epochs, soft.batch_size)
    assert labels.student == soft.student


def test_the_quick_form_differs_in_lengths_alone_and_lies_elsewhere():
    shorter = {"teacher_epochs", "student_epochs", "recorded"}
    assert FULL.model_dump(exclude=shorter) == QUICK.model_dump(exclude=shorter)
    assert all(getattr(QUICK, name) < getattr(FULL, name) for name in shorter)
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
        ("jitter", -1),
        ("student_hidden", [0]),
        ("student_epochs", 0),
        ("student_batch", 0),
        ("soft_clip", 0),
        ("temperature", 0),
        ("alpha", 0),
        ("alpha", 1.1),
        ("recorded", 0),
        ("workers", -1),
    ],
)
def test_settings_out_of_bounds_are_refused(setting, value):
    with pytest.raises(ValidationError, match=setting):
        HintonSettings.model_validate({setting: value})


def test_no_seed_is_refused():
    assert kd_cache("reproduce", "hinton-mnist", "--seeds", "0").code == 2
