from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from cache_service.datasets import DatasetConfig, open_dataset

STRIPS = Path(__file__).resolve().parents[2] / "examples" / "cifar100_strips.py"


def test_every_imagenet_jpeg_decodes_to_rgb(real_data):
    dataset = open_dataset(DatasetConfig(name="folder", root=str(real_data / "imagenet-64")))
    assert (len(dataset), len(dataset.classes)) == (64, 64)
    assert {dataset.image(sample).mode for sample in range(64)} == {"RGB"}


def test_cifar100_strips_are_the_whole_of_cifar100(real_data):
    for split, count in (("train", 500), ("test", 100)):
        dataset = open_dataset(
            DatasetConfig(
                name=f"{STRIPS}:{split}",
                root=str(real_data / "cifar100"),
                split=split,
            )
        )
        assert np.bincount(dataset.labels).tolist() == [count] * 100
        assert dataset.labels[:100].tolist() == list(range(100))
        assert (dataset.classes[0], dataset.classes[99]) == ("apple", "worm")
        assert dataset.image(count * 100 - 1).size == (32, 32)


def test_mnist_opens_by_timms_name(real_data, tmp_path):
    # Unpacks 12 MB: torchvision reads the files unpacked, and the copies on hand are not.
    shutil.copytree(real_data / "mnist", tmp_path / "MNIST" / "raw")
    settings = {"name": "torch/mnist", "root": str(tmp_path), "args": {"download": True}}
    dataset = open_dataset(DatasetConfig(split="test", **settings))
    assert (len(dataset), dataset.id.num_classes) == (10_000, 10)
    assert dataset.image(0).mode == "RGB"
