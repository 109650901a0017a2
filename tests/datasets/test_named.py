from __future__ import annotations

import sys

import pytest

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.errors import DatasetError, KdCacheError

FACTORY = """
import numpy as np

class Gray:
    def __init__(self, root, count):
        self.root, self.count = root, count
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        return np.full((4, 4), index, np.uint8), index % 2

def gray(root="nowhere", *, count=6):
    if count < 0:
        raise ValueError("count\\nis negative")
    return Gray(root, count)

number = 3
"""


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FACTORY)
    return str(path)


def opened(name, **settings):
    return open_dataset(DatasetConfig(name=name, **settings))


def test_a_factory_is_called_with_args_and_root(factory):
    dataset = opened(f"{factory}:gray", root="here", args={"count": 8}, split="mine")
    assert dataset.labels.tolist() == [0, 1] * 4
    assert dataset.image(7).getpixel((0, 0)) == (7, 7, 7)


def test_a_factory_in_a_file_is_named_without_its_folder(factory):
    assert opened(f"{factory}:gray").id.name == "mine.py:gray"


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        (
            "gray",
            {"cuont": 8},
            r"dataset \S+mine.py:gray does not take cuont.*It takes \(root.*dataset.args",
        ),
        ("gray", {"count": -1}, r"failed: ValueError: count is negative \(mine.py, line \d+\)"),
        ("number", {}, "is a int, not a function"),
    ],
)
def test_a_factory_that_cannot_be_called_says_so_in_one_line(factory, name, args, says):
    with pytest.raises(DatasetError, match=says) as refusal:
        opened(f"{factory}:{name}", args=args)
    assert "\n" not in str(refusal.value)


def test_a_factory_that_is_not_there_is_refused(factory):
    for name in (f"{factory}:absent", "no_such_module:factory"):
        with pytest.raises(KdCacheError, match=r"has no .absent.|no_such_module") as refusal:
            opened(name)
        assert refusal.value.exit_code == 2


def test_a_torchvision_dataset_opens_by_timms_name(folder):
    by_timm = opened("torch/image_folder", root=str(folder))
    assert by_timm.id.sha256 == opened("folder", root=str(folder)).id.sha256


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "torch/cifar100"}, "needs `root`"),
        ({"name": "torch/cifar100", "split": "tset"}, "splits train and test, not 'tset'"),
        ({"name": "torch/cifar100"}, "not found.*download: true"),
        ({"name": "torch/cifra"}, "Unknown torchvision dataset cifra"),
        ({"name": "wds/laion"}, "is a stream.*hfds/laion"),
        ({"name": "cifar100"}, "is unknown: expected folder"),
    ],
)
def test_a_dataset_that_cannot_be_opened_says_why_in_one_line(tmp_path, settings, says):
    root = {} if "root" in says else {"root": str(tmp_path)}
    with pytest.raises(DatasetError, match=says) as refusal:
        opened(**settings, **root)
    assert "\n" not in str(refusal.value)


def test_hugging_face_datasets_are_asked_for_by_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match="pip install datasets"):
        opened("hfds/cifar100")


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: refused at once
    with pytest.raises(DatasetError, match=r"torch/kmnist \(train\) cannot be opened") as refusal:
        opened("torch/kmnist", root=str(tmp_path), args={"download": True})
    assert "\n" not in str(refusal.value)
