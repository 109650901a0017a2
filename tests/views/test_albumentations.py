"""Transforms of Albumentations are called by keyword, and seeded for each view by their methods."""

from __future__ import annotations

import numpy as np
import pytest
from support.builds import open_toy, record_toy
from support.toys import Patches

from cache_service.datasets import wrap_dataset
from cache_service.errors import UnsupportedError
from cache_service.format.recipe import AugmentConfig
from cache_service.recording.engines import prepare
from cache_service.rows.reader import open_cache
from cache_service.views.replay import Views
from distill import CachedDataset, load_cache

PIPELINES = """
import numpy as np
import albumentations as A

def crops():
    return A.Compose([A.RandomCrop(16, 16), A.OneOf([A.HorizontalFlip(), A.Transpose()]),
                      A.SomeOf([A.ColorJitter(), A.GaussNoise(), A.CoarseDropout()], n=2)])

def single():
    return A.RandomCrop(16, 16)

class Paint(A.ImageOnlyTransform):
    def __init__(self, channels, level, p):
        super().__init__(p=p)
        self.channels, self.level = channels, level
    def apply(self, img, **params):
        img = img.copy()
        img[..., self.channels] = self.level
        return img

def coins():
    # The colors of a view show which of two transforms of probability 0.5 were applied.
    return A.Compose([Paint([0, 1, 2], 0, p=1), Paint(0, 255, p=0.5), Paint(1, 255, p=0.5)])

def tensors():
    return A.Compose([A.RandomCrop(16, 16), A.ToTensorV2()])

def hidden():
    inner = A.Compose([A.RandomCrop(16, 16), A.RandomBrightnessContrast(p=1)])
    return lambda image: inner(image=np.array(image))["image"]

class Inside(A.ImageOnlyTransform):
    # Albumentations does not know of the transform that this one holds.
    def __init__(self):
        super().__init__(p=1)
        self.noise = A.GaussNoise(p=1)
    def apply(self, img, **params):
        return self.noise(image=img[:16, :16])["image"]

def inside():
    return A.Compose([Inside()])
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("albumentations") / "mine.py"
    path.write_text(PIPELINES)
    return str(path)


@pytest.fixture(scope="module")
def images():
    return wrap_dataset(Patches(80, side=24))


def rendered(file, name, images, seed=0, positions=range(80), size=16):
    config = AugmentConfig(size=size, callable=f"{file}:{name}")
    return Views(config.recipe(), images).render(seed, positions)


@pytest.mark.parametrize("name", ["crops", "single", "tensors"])
def test_a_transform_is_seeded_by_seed_and_sample(file, images, name):
    whole = rendered(file, name, images)
    for position in (0, 7, 79):
        alone = rendered(file, name, images, positions=[position])
        np.testing.assert_array_equal(alone.pixels_BHW3[0], whole.pixels_BHW3[position])
    assert (rendered(file, name, images, seed=1).digests_B != whole.digests_B).mean() > 0.9


def test_transforms_draw_independently_of_each_other(file, images):
    # set_random_seed would apply both or neither: each would have a generator in the same state.
    first = rendered(file, "coins", images, size=24).pixels_BHW3[:, 0, 0]
    both = [tuple(row) for row in (first[:, :2] == 255).tolist()]
    assert {each: both.count(each) > 8 for each in set(both)} == {
        (a, b): True for a in (False, True) for b in (False, True)
    }


def test_a_recording_is_trained_from(file, images, tmp_path):
    changes = {"augment": {"callable": f"{file}:crops", "size": 16}, "seeds": "0:1"}
    record_toy(str(tmp_path / "c"), **changes)
    data = CachedDataset(load_cache(str(tmp_path / "c")), images=Patches(96), seed=0)
    assert len(data.__getitems__(list(range(96)))) == 96
    assert "albumentations" in open_cache(str(tmp_path / "c")).versions


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hidden", r"<lambda>\.inner\.\w+ \(.* Return the Albumentations Compose itself"),
        ("inside", r"Compose\.transforms\[0\]\.noise\.\w+ \("),
    ],
)
def test_generators_that_albumentations_does_not_seed_are_named_before_a_row_is_recorded(
    file, tmp_path, name, says
):
    build = open_toy(str(tmp_path / "c"), augment={"callable": f"{file}:{name}", "size": 16})
    with pytest.raises(UnsupportedError, match=says) as refusal:
        prepare(build)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "c").exists()
