"""CIFAR-100 from strips or pickles into memory maps: the same images, labels and parts of them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from support.strips import write_strips

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.errors import DatasetError
from cli.experiments.reproduce.cifar100 import FACTORY, cifar100, decode


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoded")
    source = write_strips(folder / "strips", num_classes=6, num_train=5, num_test=2)
    decode(str(source), str(folder / "maps"))
    return folder / "maps"


def test_classes_come_in_turn_with_their_official_numbers(decoded):
    images = cifar100(str(decoded))
    assert images.classes == tuple(f"color{label}" for label in range(6))
    assert images.targets.tolist() == [0, 1, 2, 3, 4, 5] * 5
    assert len(cifar100(str(decoded), "test")) == 12
    red, label = images[6]
    assert (red.shape, red.dtype, label) == ((32, 32, 3), np.uint8, 0)
    assert red[..., 0].min() >= 170 > red[..., 1].max()


def test_images_stay_on_disk_until_they_are_asked_for(decoded):
    assert isinstance(cifar100(str(decoded))._pixels_NHW3, np.memmap)


def test_some_classes_are_spread_over_all_and_numbered_anew(decoded):
    some = cifar100(str(decoded), num_classes=3, per_class=2)
    assert some.classes == ("color0", "color2", "color4")
    assert some.targets.tolist() == [0, 1, 2, 0, 1, 2]
    whole = cifar100(str(decoded))
    assert np.array_equal(some[4][0], whole[8][0])


def test_shrinking_averages_blocks_to_the_nearest_level(decoded):
    small, _ = cifar100(str(decoded), shrink=4)[3]
    blocks = cifar100(str(decoded))[3][0].reshape(8, 4, 8, 4, 3).astype(np.float64)
    assert small.shape == (8, 8, 3)
    assert np.array_equal(small, np.floor(blocks.mean(axis=(1, 3)) + 0.5))


def test_a_second_decoding_writes_nothing(decoded, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in decoded.iterdir()}
    decode(str(tmp_path / "nowhere"), str(decoded))
    assert {path: path.stat().st_mtime_ns for path in decoded.iterdir()} == before


def test_pickles_of_torchvision_are_the_same_images(tmp_path):
    source = write_strips(tmp_path / "strips", num_classes=2, num_train=3, num_test=2)
    decode(str(source), str(tmp_path / "one"))
    folder = tmp_path / "pickles" / "cifar-100-python"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        images = cifar100(str(tmp_path / "one"), part)
        rows = np.stack([images[i][0].transpose(2, 0, 1).reshape(-1) for i in range(len(images))])
        content = {"data": rows, "fine_labels": images.targets.tolist()}
        (folder / part).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["color0", "color1"]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.CIFAR100._check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
        decode(str(tmp_path / "pickles"), str(tmp_path / "other"))
    ids = [
        open_dataset(DatasetConfig(name=FACTORY, root=str(tmp_path / name))).id
        for name in ("one", "other")
    ]
    assert ids[0] == ids[1]


def test_neither_strips_nor_pickles_is_said_with_how_to_get_them(tmp_path):
    with pytest.raises(DatasetError, match=r"neither classes\.txt") as refused:
        decode(str(tmp_path), str(tmp_path / "maps"))
    assert "download=True" in refused.value.hint
    assert not (tmp_path / "maps").exists()


def test_a_missing_or_damaged_strip_is_named(tmp_path):
    source = write_strips(tmp_path / "strips", num_classes=2)
    (source / "test" / "color1.webp").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"test/color1\.webp"):
        decode(str(source), str(tmp_path / "maps"))
    with pytest.raises(DatasetError, match="no decoded CIFAR-100"):
        cifar100(str(tmp_path / "maps"))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"part": "valid"}, "parts train and test"),
        ({"num_classes": 7}, "has 6 classes"),
        ({"num_classes": 1}, "has 6 classes"),
        ({"shrink": 3}, "shrink=3"),
        ({"shrink": 0}, "shrink=0"),
    ],
)
def test_parts_that_there_are_not_are_refused(decoded, asked, told):
    with pytest.raises(DatasetError, match=told):
        cifar100(str(decoded), **asked)
