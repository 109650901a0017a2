"""What a dataset of a user's own raises is one line with the sample, here and from a worker."""

from __future__ import annotations

import pickle
import sys

import pytest
from support.builds import open_toy
from support.command import kd_cache

from cache_service.datasets import DatasetConfig, open_dataset, wrap_dataset
from cache_service.errors import DatasetError, UnreadableSampleError
from cache_service.loading import load_ahead

BROKEN = """
import sys
import numpy as np

class Broken:
    classes = ("a", "b")
    def __init__(self, count, at, how):
        self.targets = [n % 2 for n in range(count)]
        self.at, self.how = at, how
    def __len__(self):
        return len(self.targets)
    def __getitem__(self, index):
        if index == self.at:
            self.fail()
        return np.full((4, 4), index, np.uint8), self.targets[index]
    def fail(self):
        if self.how == "key":
            return {}["image_id"]
        if self.how == "value":
            raise ValueError("no such id\\nin the table")
        if self.how == "exit":
            sys.exit(3)
        if self.how == "zero":
            return 1 // 0
        raise FileNotFoundError(2, "No such file or directory", "gone.jpg")

def broken(count=80, at=40, how="key"):
    return Broken(count, at, how)

class Unlisted(Broken):
    @property
    def targets(self):
        raise AttributeError("not listed")
    @targets.setter
    def targets(self, values):
        self.labels_ = values
    def __len__(self):
        return 80
    def __getitem__(self, index):
        if index == self.at:
            self.fail()
        return np.full((4, 4), index, np.uint8), index % 2

def unlisted(at=40, how="key"):
    return Unlisted(80, at, how)

class Noisy:
    # Makes its images when it is opened.
    targets = [0, 1] * 4
    def __init__(self):
        self.images = np.random.default_rng().integers(0, 256, (8, 4, 4), np.uint8)
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return self.images[index], index % 2

def noisy():
    return Noisy()

class Shapeless:
    def __len__(self):
        return self.n_samples
    def __getitem__(self, index):
        return None

def shapeless():
    return Shapeless()
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(BROKEN)
    return str(path)


def opened(file, name, **args):
    return open_dataset(DatasetConfig(name=f"{file}:{name}", args=args))


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("key", DatasetError, r"reading sample 39 failed: KeyError: 'image_id' \(mine.py, line 1"),
        ("zero", DatasetError, r"reading sample 39 failed: ZeroDivisionError: .* \(mine.py, line"),
        ("exit", DatasetError, r"reading sample 39 failed: it ended the program \(mine.py, line"),
        ("value", UnreadableSampleError, r"sample 39 .*ValueError: no such id in the table \(mine"),
        ("file", UnreadableSampleError, r"sample 39 .*FileNotFoundError: .*gone.jpg' \(mine.py"),
    ],
)
@pytest.mark.parametrize("name", ["broken", "unlisted"])
def test_an_exception_of_a_dataset_is_one_line_with_sample_and_place(file, name, how, kind, says):
    if name == "unlisted":  # its labels are found by reading every sample
        with pytest.raises(DatasetError, match=says.removeprefix("sample 39 .*")) as refusal:
            opened(file, name, at=39, how=how)
    else:
        dataset = opened(file, name, at=39, how=how)
        with pytest.raises(kind, match=says) as refusal:
            dataset.image(39)
    assert "\n" not in str(refusal.value)


def test_an_exception_in_a_loader_worker_is_the_same_line(file):
    dataset = opened(file, "broken", at=39)
    with pytest.raises(DatasetError, match=r"reading sample 39 failed: KeyError: 'image_id'"):
        list(load_ahead(dataset.image, range(36, 42), workers=1))


def test_a_build_ends_in_that_line_and_no_traceback(file, tmp_path):
    build = open_toy(str(tmp_path / "c")).config.model_dump(mode="json")
    build["dataset"] = {"name": f"{file}:broken", "args": {"at": 39}}
    build["teacher"]["num_classes"] = None
    from support.builds import write_file

    ended = kd_cache("build", str(write_file(tmp_path / "b.yaml", build)))
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert "error[dataset]: mine.py:broken (train): reading sample 39 failed" in ended.err


def test_a_dataset_that_cannot_be_listed_is_refused_in_one_line(file):
    with pytest.raises(DatasetError, match=r"cannot be listed: AttributeError: .*n_samples.*mine"):
        opened(file, "shapeless")


def test_items_with_names_are_refused_with_their_keys():
    with pytest.raises(DatasetError, match=r"type dict with keys image, label: expected \(image"):
        wrap_dataset([{"image": None, "label": 0}] * 3)


def test_a_target_transform_that_fails_is_one_line(folder):
    from torchvision.datasets import ImageFolder

    items = ImageFolder(str(folder), target_transform=lambda label: {}[label])
    with pytest.raises(DatasetError, match=r"target_transform failed: KeyError: 0 \(test_own_erro"):
        wrap_dataset(items)
    assert "mine" not in sys.modules


def test_a_dataset_that_is_another_one_in_a_worker_is_refused_there(file):
    dataset = opened(file, "noisy")
    with pytest.raises(
        DatasetError, match=r"opened again .* another image for sample 0"
    ) as refusal:
        pickle.loads(pickle.dumps(dataset)).image(5)
    assert "fixed seed" in refusal.value.hint
    same = pickle.loads(pickle.dumps(opened(file, "broken", at=39)))
    assert same.image(5).getpixel((0, 0)) == (5, 5, 5)
