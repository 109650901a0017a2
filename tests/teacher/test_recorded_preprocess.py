"""A student that becomes a teacher is fed what it was trained on."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file
from support.toys import tiny_net

from cache_service.errors import ConfigError
from cache_service.teacher.settings import TeacherConfig
from cache_service.teacher.teacher import load_teacher

FED = {"size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "student.safetensors"
    save_file(tiny_net().state_dict(), path, metadata={"preprocess": json.dumps(FED)})
    return str(path)


def load(checkpoint: str, **settings):
    config = TeacherConfig(model="support.toys:tiny_net", checkpoint=checkpoint, **settings)
    return load_teacher(config, scales=(1,), num_classes=5, view_size=32, device="cpu")


def test_what_the_checkpoint_says_it_was_fed_is_what_it_is_fed(checkpoint):
    found = load(checkpoint).id.preprocess
    assert found.model_dump(mode="json") == FED


def test_the_build_file_wins_over_the_checkpoint(checkpoint):
    found = load(checkpoint, mean=(0.1, 0.1, 0.1), std=(0.9, 0.9, 0.9), input_size=24).id.preprocess
    assert (found.mean, found.std, found.size) == ((0.1,) * 3, (0.9,) * 3, 24)
    assert found.interpolation == "bicubic"


def test_a_checkpoint_that_says_nonsense_is_refused(tmp_path):
    path = tmp_path / "bad.safetensors"
    save_file(tiny_net().state_dict(), path, metadata={"preprocess": '{"size": "tall"}'})
    with pytest.raises(ConfigError, match=r"bad\.safetensors"):
        load(str(path))
