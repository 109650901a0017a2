"""A user's own pipeline: seeded per view, and the global generators given back."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch

from cache_service.errors import ConfigError
from cache_service.format.recipe import AugmentConfig
from cache_service.views.replay import Views

PIPELINES = """
import random
import numpy as np
import torch
from torchvision.transforms import v2

def crops():
    return v2.Compose([v2.RandomResizedCrop(24), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)])

def tensors():
    return v2.Compose([crops(), v2.PILToTensor()])

def arrays():
    def pipeline(image):
        noise = torch.randint(0, 9, (24, 24, 3), dtype=torch.uint8).numpy()
        place = random.randint(0, 5)
        pixels = np.asarray(image.resize((24, 24))) // 2 + noise
        pixels[place, np.random.randint(24)] = 255
        return pixels
    return pipeline

def only_python():
    return lambda image: np.full((24, 24, 3), random.randrange(256), np.uint8)

def only_numpy():
    return lambda image: np.full((24, 24, 3), np.random.randint(256), np.uint8)

def only_torch():
    return lambda image: torch.randint(256, (), dtype=torch.uint8).expand(3, 24, 24)

def floats():
    return v2.Compose([crops(), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])

def small():
    return v2.Resize((9, 9))

def grey():
    return v2.Compose([crops(), v2.Grayscale()])

def number():
    return 3

def nothing():
    return lambda image: None
"""


@pytest.fixture
def make_views(tmp_path, synthetic):
    (tmp_path / "pipelines.py").write_text(PIPELINES)

    def make(name):
        config = AugmentConfig(size=24, callable=f"{tmp_path / 'pipelines.py'}:{name}")
        return Views(config.recipe(), synthetic())

    return make


@pytest.mark.parametrize("name", ["crops", "tensors", "arrays"])
def test_a_users_pipeline_replays_at_every_batch_size(make_views, name):
    views = make_views(name)
    whole = views.render(2, range(40))
    for position in (0, 7, 39):
        alone = views.render(2, [position])
        np.testing.assert_array_equal(alone.pixels_BHW3[0], whole.pixels_BHW3[position])
        assert alone.origins_B[0] == whole.origins_B[position]
    assert len(np.unique(whole.digests_B)) == 40
    assert (views.render(3, range(40)).digests_B != whole.digests_B).all()
    assert (whole.partners_B == whole.samples_B).all()


@pytest.mark.parametrize("name", ["only_python", "only_numpy", "only_torch"])
def test_each_global_generator_is_seeded_by_seed_and_sample(make_views, name):
    views = make_views(name)
    levels = views.render(0, range(40)).pixels_BHW3[:, 0, 0, 0]
    assert len(np.unique(levels)) > 20
    assert (views.render(1, range(40)).pixels_BHW3[:, 0, 0, 0] != levels).mean() > 0.8
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    np.testing.assert_array_equal(views.render(0, range(40)).pixels_BHW3[:, 0, 0, 0], levels)


def test_a_users_pipeline_survives_pickling(make_views):
    views = make_views("crops")
    again = pickle.loads(pickle.dumps(views)).render(2, range(5))
    np.testing.assert_array_equal(again.digests_B, views.render(2, range(5)).digests_B)


def test_tensors_and_images_are_one_view(make_views):
    images, tensors = make_views("crops").render(0, [0]), make_views("tensors").render(0, [0])
    np.testing.assert_array_equal(images.pixels_BHW3, tensors.pixels_BHW3)


def test_the_global_generators_are_given_back_even_after_a_failure(make_views):
    def next_numbers():
        return random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = next_numbers()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    make_views("arrays").render(0, range(3))
    assert next_numbers() == expected
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with pytest.raises(ConfigError, match=r"uint8\[9, 9, 3\]"):
        make_views("small").render(0, [0])
    assert next_numbers() == expected


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("floats", r"Tensor float32\[3, 24, 24\].*size = 24.*before ToTensor"),
        ("small", r"uint8\[9, 9, 3\]"),
        ("grey", r"uint8\[24, 24\]"),
        ("nothing", r"returned NoneType object\[\]"),
        ("number", r"returned int, not a callable"),
        ("missing", r"has no 'missing'"),
    ],
)
def test_what_is_not_a_view_is_refused_and_said(make_views, name, says):
    with pytest.raises(ConfigError, match=says):
        make_views(name).render(0, [0])
