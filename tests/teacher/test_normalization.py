"""A wrong normalization of a teacher's input is told from the right one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cache_service.errors import UntrainedTeacherError
from cache_service.teacher.normalization import find_other_normalization
from cache_service.teacher.score import require_trained, score_teacher
from cache_service.teacher.settings import TeacherConfig

HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
GREYS = np.arange(10) * 20 + 30
"""The class of a view is its brightness, to which noise of a whole step is added."""


@pytest.fixture(scope="module")
def brightness(tmp_path_factory):
    """A teacher that learned brightness from -1 to 1: the name of its factory."""
    folder = tmp_path_factory.mktemp("bright")
    (folder / "kd_cache_test_bright.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Bright(nn.Module):\n"
        "    def __init__(self, channels):\n"
        "        super().__init__()\n"
        f"        levels = torch.tensor({GREYS.tolist()}) / 255 * 2 - 1\n"
        "        self.register_buffer('levels', levels)\n"
        "    def forward(self, images):\n"
        "        return -200 * (images.mean((1, 2, 3))[:, None] - self.levels) ** 2\n"
        "def bright(num_classes=10, channels=3):\n"
        "    return Bright(channels)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "kd_cache_test_bright:bright"


def labeled_views(count):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, count)
    levels = GREYS[labels] + rng.normal(0, 6, count)
    pixels = np.broadcast_to(levels[:, None, None, None], (count, 32, 32, 3))
    views = torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8))
    return list(views.split(40)), labels


@pytest.mark.parametrize("given", [IMAGENET, {"mean": (0,) * 3, "std": (1,) * 3}])
def test_a_better_normalization_is_found(load, brightness, given):
    views, labels = labeled_views(64)
    other = find_other_normalization(load(brightness, **given), views, labels)
    assert (other.name, other.mean, other.std) == ("-1 to 1", HALF["mean"], HALF["std"])
    assert other.right > other.right_now
    assert other.preferred > 0.8
    assert other.hint == "teacher.mean: [0.5, 0.5, 0.5] and teacher.std: [0.5, 0.5, 0.5]"


def test_the_right_normalization_is_left_alone(load, brightness):
    views, labels = labeled_views(64)
    assert find_other_normalization(load(brightness, **HALF), views, labels) is None


def test_a_few_views_prove_nothing(load, brightness):
    views, labels = labeled_views(15)
    assert find_other_normalization(load(brightness, **IMAGENET), views, labels) is None


def test_a_grey_teacher_is_compared_under_normalizations_of_one_channel(load, brightness):
    views, labels = labeled_views(64)
    settings = {"channels": 1, "model_args": {"channels": 1}, "mean": (0.1307,), "std": (0.3081,)}
    other = find_other_normalization(load(brightness, **settings), views, labels)
    assert (other.name, other.mean) == ("-1 to 1", (0.5,))


def test_an_assumed_normalization_is_refused_and_a_stated_one_is_kept(load, brightness):
    views, labels = labeled_views(64)
    score = score_teacher(load(brightness), views, labels)
    assert score.accuracy > score.needed  # only the normalization is wrong
    says = r"normalized by -1 to 1.*Set teacher\.mean: \[0\.5, 0\.5, 0\.5\]"
    with pytest.raises(UntrainedTeacherError, match=says) as refusal:
        require_trained(score, TeacherConfig(model=brightness))
    assert "\n" not in str(refusal.value)
    require_trained(score, TeacherConfig(model=brightness, **IMAGENET))
    require_trained(score, TeacherConfig(model=brightness, allow_untrained=True))
