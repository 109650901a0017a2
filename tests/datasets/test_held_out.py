"""`dataset.hold_out` divides a training split in two, always in the same way."""

from __future__ import annotations

import pickle

import numpy as np
import PIL.Image
import pytest

from cache_service.config import validate_config
from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.errors import ConfigError, DatasetError

COUNTS = {"ants": 10, "bees": 4, "wasps": 1}


def write_images(root, counts):
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            color = (label, index, 0)
            PIL.Image.new("RGB", (4, 4), color).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", COUNTS)


def opened(root, *, split="train", share=0.2, names=(), **settings):
    settings = {"name": "folder", "root": str(root), "split": split, **settings}
    return open_dataset(DatasetConfig(hold_out=share, **settings), class_names=names)


def colors(dataset):
    return {tuple(np.asarray(image)[0, 0].tolist()) for image, _ in dataset}


def counts(dataset):
    return np.bincount(dataset.labels, minlength=len(dataset.classes)).tolist()


def test_both_parts_together_are_the_whole_and_no_image_is_in_both(photos):
    train, held = opened(photos), opened(photos, split="val")
    assert colors(train) & colors(held) == set()
    whole = {(label, i, 0) for label, n in enumerate(COUNTS.values()) for i in range(n)}
    assert colors(train) | colors(held) == whole


def test_each_class_gives_its_share_and_a_class_of_one_image_keeps_it(photos):
    assert counts(opened(photos)) == [8, 3, 1]
    assert counts(opened(photos, split="val")) == [2, 1, 0]
    assert counts(opened(photos, share=0.99)) == [1, 1, 1]
    assert counts(opened(photos, share=0.01, split="test")) == [1, 1, 0]


def test_images_and_labels_stay_together(photos):
    for split in ("train", "val"):
        dataset = opened(photos, split=split)
        for index in range(len(dataset)):
            image, label = dataset[index]
            assert np.asarray(image)[0, 0, 0] == label
            assert f"/{dataset.classes[label]}/" in dataset.describe(index)


def test_images_that_are_added_move_few_of_the_others(photos):
    before = colors(opened(photos, split="val"))
    write_images(photos, COUNTS | {"ants": 15})
    after = colors(opened(photos, split="val"))
    assert before <= after


def test_another_folder_of_the_same_images_holds_out_the_same(photos, tmp_path):
    other = write_images(tmp_path / "elsewhere", COUNTS)
    one, two = opened(photos), opened(other)
    assert one.id == two.id
    assert one.id != opened(photos, share=0.5).id != opened(photos, share=0.5, split="val").id


def test_the_training_folder_is_divided_even_if_there_is_another_one(photos, tmp_path):
    root = tmp_path / "splits"
    write_images(root / "train", {"ants": 10, "bees": 10})
    write_images(root / "val", {"ants": 1, "bees": 1})
    assert len(opened(root, split="val")) == 4
    assert len(opened(root)) == 16


def test_classes_are_arranged_after_the_division(photos):
    order = ["wasps", "ants", "bees"]
    dataset = opened(photos, classes=order)
    assert counts(dataset) == [1, 8, 3]
    assert opened(photos, split="val", names=dataset.classes).classes == tuple(order)


def test_a_dataset_without_paths_is_divided_by_number():
    digits = {"name": "digits", "hold_out": 0.25}
    train, held = (open_dataset(DatasetConfig(split=split, **digits)) for split in ("train", "val"))
    whole = open_dataset(DatasetConfig(name="digits"))
    assert len(train) + len(held) == len(whole)
    assert abs(len(held) - len(whole) / 4) <= 5
    assert np.array_equal(np.bincount(train.labels) + np.bincount(held.labels), counts(whole))


def test_a_copy_in_a_worker_process_reads_the_same_images(photos):
    held = opened(photos, split="val")
    copy = pickle.loads(pickle.dumps(held))
    assert colors(copy) == colors(held)


def test_a_folder_of_one_image_a_class_has_nothing_to_hold_out(tmp_path):
    root = write_images(tmp_path, {"ants": 1, "bees": 1})
    with pytest.raises(DatasetError, match="holds out no image of dataset folder"):
        opened(root, split="val")


@pytest.mark.parametrize("share", [0, 1, -0.1, 2, "some"])
def test_a_share_is_above_0_and_below_1(share):
    document = {"name": "folder", "root": "photos", "hold_out": share}
    with pytest.raises(ConfigError, match="hold_out"):
        validate_config(DatasetConfig, document, where="dataset")


def test_without_it_a_section_is_stored_as_before():
    assert "hold_out" not in DatasetConfig(name="digits").model_dump()
    assert DatasetConfig(name="digits", hold_out=0.5).model_dump()["hold_out"] == 0.5
