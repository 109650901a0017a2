from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.errors import ConfigError, DatasetError


@pytest.fixture
def numbered(tmp_path):
    """Class folders 1, 2 and 10 with images whose red value is the number."""
    for split in ("train", "val"):
        for name in ("1", "2", "10"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            PIL.Image.new("RGB", (4, 4), (int(name), 0, 0)).save(folder / "0.png")
    return tmp_path


def opened(root, *, split="train", names=(), **settings):
    config = DatasetConfig(name="folder", root=str(root), split=split, **settings)
    return open_dataset(config, class_names=names)


def named_pixels(dataset):
    """What the label of each image says, and what the image says."""
    return [(int(dataset.classes[label]), np.asarray(image)[0, 0, 0]) for image, label in dataset]


@pytest.mark.parametrize(
    ("order", "classes"),
    [
        (None, ("1", "10", "2")),
        ("text", ("1", "10", "2")),
        ("natural", ("1", "2", "10")),
        (["2", "1", "10"], ("2", "1", "10")),
    ],
)
def test_classes_are_numbered_in_the_order_asked_for(numbered, order, classes):
    dataset = opened(numbered, classes=order)
    assert dataset.classes == classes
    assert all(name == pixel for name, pixel in named_pixels(dataset))


def test_another_order_is_another_dataset_and_the_same_order_is_the_same(numbered):
    orders = (None, "text", "natural")
    plain, text, natural = (opened(numbered, classes=order).id.sha256 for order in orders)
    assert plain == text != natural


def test_a_list_must_name_each_class_once(numbered):
    with pytest.raises(DatasetError, match="left out: '10'; not a class there: '3'"):
        opened(numbered, classes=["1", "2", "3"])
    with pytest.raises(DatasetError, match="must name each of the 3 classes"):
        opened(numbered, classes=["1", "2", "10", "1"])


def test_a_dataset_without_class_names_cannot_be_arranged(tmp_path, monkeypatch):
    source = "def pairs():\n    import numpy as np\n"
    source += "    return [(np.zeros((4, 4, 3), np.uint8), label) for label in (0, 1)]\n"
    (tmp_path / "nameless.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match="has no class names"):
        open_dataset(DatasetConfig(name="nameless.py:pairs", classes="natural"))


def test_a_config_without_the_setting_is_written_as_before_it():
    assert "classes" not in DatasetConfig(name="digits").model_dump(mode="json")
    document = DatasetConfig(name="digits", classes="natural").model_dump(mode="json")
    assert document["classes"] == "natural"


def test_another_split_gets_the_labels_of_its_class_names(numbered):
    val = opened(numbered, split="val", names=("10", "2", "1"))
    assert val.classes == ("10", "2", "1")
    assert all(name == pixel for name, pixel in named_pixels(val))


def test_a_split_may_lack_a_class(numbered):
    (numbered / "val" / "10" / "0.png").unlink()
    (numbered / "val" / "10").rmdir()
    val = opened(numbered, split="val", names=("1", "10", "2"))
    assert val.id.num_classes == 3
    assert val.labels.tolist() == [0, 2]


def test_a_class_that_training_does_not_have_is_refused_by_name(numbered):
    (numbered / "val" / "10").rename(numbered / "val" / "11")
    with pytest.raises(ConfigError, match="'11' of 3 classes here, where training has '10' of 3"):
        opened(numbered, split="val", names=("1", "10", "2"))


def test_numbers_compare_splits_whose_names_differ_by_number_alone(numbered):
    val = opened(numbered, split="val", classes="numbers", names=("one", "ten", "two"))
    assert val.classes == ()
    assert val.labels.tolist() == [0, 1, 2]
