from __future__ import annotations

import pytest
from pydantic import ValidationError

from cache_service.errors import ConfigError
from cache_service.models.zoo.base import CIFAR_MEAN, CIFAR_STD
from cache_service.teacher.settings import TeacherConfig


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": ""}, "at least 1 character"),
        ({"checkpoint": ""}, "at least 1 character"),
        ({"num_classes": 1}, "greater than or equal to 2"),
        ({"input_size": 7}, "greater than or equal to 8"),
        ({"input_size": 4097}, "less than or equal to 4096"),
        ({"mean": (0, 0), "std": (1, 1, 1)}, "2 numbers, and teacher.channels is 3"),
        ({"mean": (0, 0, 0), "std": (1, 0, 1)}, "greater than 0"),
        ({"mean": (0, 0, 0)}, "go together"),
        ({"std": (1, 1, 1)}, "go together"),
        ({"interpolation": "nearest"}, "'bilinear' or 'bicubic'"),
        ({"precision": "int8"}, "'float32', 'bfloat16' or 'float16'"),
        ({"pooling": "max"}, "'direct' or 'chained'"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": 2**63}, "less than"),
        ({"pretrained": True, "checkpoint": "a.pt"}, "both name its weights"),
        ({"checkpoint": "a.pt", "checkpoint_key": ""}, "at least 1 character"),
        ({"checkpoint": "a.pt", "checkpoint_weights": "best"}, "'raw' or 'averaged'"),
        ({"checkpoint_key": "teacher"}, "checkpoint_key chooses within teacher.checkpoint"),
        ({"checkpoint_weights": "raw"}, "checkpoint_weights chooses within teacher.checkpoint"),
        ({"chekpoint": "a.pt"}, "Extra inputs are not permitted"),
    ],
)
def test_every_bound_is_enforced_and_says_why(change, says):
    with pytest.raises(ValidationError, match=says):
        TeacherConfig(**({"model": "resnet8x4"} | change))


def test_a_cifar_network_is_fed_by_the_statistics_of_cifar(load):
    fed = load().id.preprocess
    assert (fed.mean, fed.std, fed.size) == (CIFAR_MEAN, CIFAR_STD, 32)


def test_explicit_settings_win_over_the_models_own(load):
    asked = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bicubic"}
    fed = load(**asked, input_size=48).id.preprocess
    assert fed.model_dump() == asked | {"size": 48}


def test_ones_own_checkpoint_is_fed_views_as_they_are(load):
    assert load("test_resnet").id.preprocess.size == 32  # its metadata says 160


def test_a_network_of_one_size_is_fed_that_size(load):
    assert load("test_vit").id.preprocess.size == 160
    moved = load("test_vit", model_args={"img_size": 48})
    assert moved.id.preprocess.size == 48


def test_a_network_without_metadata_is_fed_by_the_statistics_of_imagenet(load, factories):
    fed = load(f"{factories}:colors").id.preprocess
    assert (fed.mean, fed.size, fed.interpolation) == ((0.485, 0.456, 0.406), 32, "bilinear")


def test_a_network_of_a_size_that_is_not_square_is_refused(load):
    with pytest.raises(ConfigError, match=r"32x64 px; views are square.*teacher\.input_size"):
        load("test_vit", model_args={"img_size": [32, 64]})


def test_a_constructor_may_have_arguments_named_like_keys_about_its_answers():
    given = {"classes": 10, "channels": 1, "output": 3}
    assert TeacherConfig(model="a:b", model_args=given).model_args == given
