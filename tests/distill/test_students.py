"""Students by name, and what they see of a view."""

from __future__ import annotations

import pytest
import torch
from support.streams import plain_net
from support.toys import NUM_CLASSES

from cache_service.errors import ConfigError
from cache_service.format.spec import Preprocess
from distill.config import StudentConfig
from distill.students import choose_device, choose_preprocess, make_student

TEACHER = Preprocess(size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bicubic")


def make(*, seed=0, **settings):
    config = StudentConfig.model_validate({"model": "support.streams:plain_net"} | settings)
    return make_student(config, num_classes=NUM_CLASSES, view_size=24, teacher=TEACHER, seed=seed)


def weights_of(name):
    return make(model=f"support.streams:{name}").model.state_dict()


def weights(student):
    return student.model.head.weight


def test_initial_weights_follow_the_runs_seed():
    assert torch.equal(weights(make(seed=3)), weights(make(seed=3)))
    assert not torch.equal(weights(make(seed=3)), weights(make(seed=4)))


def test_a_student_of_its_own_seed_ignores_the_runs():
    config = StudentConfig(model="support.streams:plain_net", seed=9, model_args={})
    one, other = (
        make_student(config, num_classes=NUM_CLASSES, view_size=24, teacher=None, seed=seed)
        for seed in (1, 2)
    )
    assert torch.equal(weights(one), weights(other))


def test_it_has_the_datasets_classes():
    assert weights(make()).shape[0] == NUM_CLASSES
    assert weights(make(num_classes=NUM_CLASSES)).shape[0] == NUM_CLASSES


def test_which_weights_of_a_checkpoint_were_loaded_and_a_notice_are_kept(tmp_path):
    torch.save({"student": weights_of("plain_net"), "epoch": 3}, tmp_path / "a.pth")
    student = make(checkpoint=str(tmp_path / "a.pth"))
    assert (student.weights_from, student.notice) == ("raw weights, student of a.pth", "")
    assert (make().weights_from, make().notice) == ("", "")
    assert "CIFAR papers is cifar_resnet18" in make(model="resnet18").notice


def test_another_class_count_is_refused():
    with pytest.raises(ConfigError, match=r"num_classes=9, but the dataset has 5 classes"):
        make(num_classes=9)


def test_it_sees_what_the_teacher_saw_at_the_views_own_size():
    found = make().preprocess
    assert (found.size, found.mean, found.std) == (24, TEACHER.mean, TEACHER.std)
    assert found.interpolation == "bilinear"


def test_what_is_given_counts_first():
    given = {"input_size": 48, "mean": [0.7] * 3, "std": [0.9] * 3, "interpolation": "bicubic"}
    assert make(**given).preprocess == Preprocess(
        size=48, mean=(0.7,) * 3, std=(0.9,) * 3, interpolation="bicubic"
    )


def test_pretrained_weights_bring_their_own_normalization():
    model = plain_net()
    model.pretrained_cfg = {"mean": (0.3,) * 3, "std": (0.2,) * 3}
    config = StudentConfig(model="m", pretrained=True, model_args={})
    found = choose_preprocess(config, model, view_size=24, teacher=TEACHER)
    assert (found.mean, found.std) == ((0.3,) * 3, (0.2,) * 3)
    fresh = choose_preprocess(
        StudentConfig(model="m", model_args={}), model, view_size=24, teacher=TEACHER
    )
    assert fresh.mean == TEACHER.mean


def test_without_a_teacher_views_are_centered():
    config = StudentConfig(model="m", model_args={})
    found = choose_preprocess(config, plain_net(), view_size=24, teacher=None)
    assert (found.mean, found.std) == ((0.5,) * 3, (0.5,) * 3)


def test_an_unknown_model_is_refused():
    with pytest.raises(ConfigError, match="there is no model 'resnet8x5'"):
        make(model="resnet8x5")


def test_a_device_is_what_it_says():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_gpu_that_is_not_there_is_refused():
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ConfigError, match=f"device: {missing} was requested; this machine has"):
        choose_device(missing)
