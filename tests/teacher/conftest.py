"""Tiny teachers, made here: nothing is downloaded, and none takes a second."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cache_service.teacher.settings import TeacherConfig
from cache_service.teacher.teacher import load_teacher

FACTORIES = """
import torch
from torch import nn

class Colors(nn.Module):
    '''Says which of the first colors of a fixed wheel the image's mean is closest to.'''
    def __init__(self, num_classes):
        super().__init__()
        angle = torch.arange(num_classes) * 6.2832 / num_classes
        self.register_buffer("wheel", torch.stack([angle.cos(), angle.sin()]))
    def forward(self, images):
        mean = images.mean((2, 3))
        return (mean[:, :2] - 0.5) @ self.wheel

def colors(num_classes):
    return Colors(num_classes)

class Map(Colors):
    '''The same, with the image for a feature map.'''
    def forward_features(self, images):
        return images
    def forward_head(self, images):
        return Colors.forward(self, images)

def pixels(num_classes):
    return Map(num_classes)

def five(num_classes):
    return Colors(5)

def pair(num_classes):
    class Pair(Colors):
        def forward(self, images):
            return super().forward(images), images
    return Pair(num_classes)
"""


@pytest.fixture(scope="session")
def factories(tmp_path_factory):
    """The name of an importable module of factories."""
    folder = tmp_path_factory.mktemp("factories")
    (folder / "kd_cache_test_teachers.py").write_text(FACTORIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "kd_cache_test_teachers"


@pytest.fixture
def load():
    """load_teacher for views of 32 px, 10 classes and the CPU, unless told otherwise."""

    def load(model="resnet8x4", *, given=None, **settings):
        config = TeacherConfig(model=model, **({"allow_untrained": True} | settings))
        asked = {"scales": (1,), "num_classes": 10, "view_size": 32, "device": "cpu"}
        return load_teacher(config, **(asked | (given or {})))

    return load


@pytest.fixture
def views():
    """Six uint8 views of noise, [6, 32, 32, 3]."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    return torch.from_numpy(pixels)
