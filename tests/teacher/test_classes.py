"""teacher.classes: which outputs of a teacher of more classes are the dataset's."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from cache_service.errors import ConfigError
from cache_service.teacher.classes import choose_outputs
from cache_service.teacher.settings import TeacherConfig

WNIDS = ("n01440764", "n01443537", "n02102040")


def chosen(classes, names=("b", "a", "c")):
    config = TeacherConfig(model="resnet8x4", classes=classes)
    return choose_outputs(config, class_names=names, num_classes=len(names) or 3)


def test_without_the_key_nothing_is_chosen():
    assert chosen(None) is None


def test_outputs_are_named_by_index():
    assert chosen([4, 1, 3]) == (4, 1, 3)


def test_outputs_are_read_from_a_file_with_one_a_line(tmp_path):
    (tmp_path / "outputs.txt").write_text("4\n1\n\n 3 \n")
    assert chosen(str(tmp_path / "outputs.txt")) == (4, 1, 3)


def test_outputs_are_found_by_the_names_of_all_outputs(tmp_path):
    assert chosen({"names": ["a", "x", "b", "c"]}) == (2, 0, 3)
    (tmp_path / "names.txt").write_text("a first letter\nx\nb second letter\nc\n")
    assert chosen({"names": str(tmp_path / "names.txt")}) == (2, 0, 3)


def test_folders_of_imagenet_classes_need_no_file():
    assert chosen({"names": "imagenet-1k"}, WNIDS) == (0, 1, 217)
    folders = [f"{index}_{wnid}" for index, wnid in enumerate(WNIDS)]
    assert chosen({"names": "imagenet-1k", "pattern": "*_{name}"}, folders) == (0, 1, 217)


def test_the_index_may_stand_in_the_names_of_the_folders():
    assert chosen({"pattern": "{index}_*"}, ("000_n01440764", "016_n01560419")) == (0, 16)
    assert chosen({"pattern": "class-{index}"}, ("class-7", "class-10")) == (7, 10)


@pytest.mark.parametrize(
    ("classes", "names", "says"),
    [
        ([1, 2], ("a", "b", "c"), "names 2 outputs, and the dataset has 3 classes"),
        ([1, 2, 1], ("a", "b", "c"), "names output 1 twice, for 'a' and 'c'"),
        ([1, 2, 1], (), "names output 1 twice, for class 0 and class 2"),
        ("nowhere.txt", ("a", "b", "c"), r"cannot read nowhere\.txt: No such file"),
        ({"names": ["a", "b"]}, ("a", "b", "c"), "has 2 names, and 'c' of the dataset is not"),
        ({"names": ["a", "b"]}, (), "the classes of the dataset have none"),
        ({"names": "imagenet-3k"}, ("a", "b", "c"), "there is no file imagenet-3k, and timm knows"),
        ({"pattern": "{index}_*"}, ("0_a", "b", "1.c"), "does not match 'b', '1.c' of the dataset"),
    ],
)
def test_a_choice_that_does_not_fit_the_dataset_is_named(classes, names, says):
    with pytest.raises(ConfigError, match=says) as refusal:
        chosen(classes, names)
    assert "\n" not in str(refusal.value)


def test_a_line_that_is_no_index_is_shown(tmp_path):
    (tmp_path / "names.txt").write_text("n01440764\n")
    with pytest.raises(ConfigError, match=r"line 'n01440764', which is not .* \{names: FILE\}"):
        chosen(str(tmp_path / "names.txt"), ("a",))


@pytest.mark.parametrize(
    "classes", [[-1], [2**24], [], "", {"pattern": "{index}{name}"}, {"names": []}, {"pattern": ""}]
)
def test_bounds_are_enforced(classes):
    with pytest.raises(ValidationError):
        TeacherConfig(model="resnet8x4", classes=classes)


@pytest.mark.parametrize("classes", [{"names": ["a"], "pattern": "{index}"}, {"pattern": "{name}"}])
def test_names_and_the_pattern_go_together(classes):
    with pytest.raises(ValidationError, match=r"give both, or \{index\}"):
        TeacherConfig(model="resnet8x4", classes=classes)


def test_only_the_chosen_logits_are_recorded_in_the_datasets_order(load, views):
    whole, some = load(), load(classes=[4, 1, 3], num_classes=10, given={"num_classes": 3})
    np.testing.assert_array_equal(some.answer(views), whole.answer(views)[..., [4, 1, 3]])
    assert (some.id.num_classes, some.id.classes) == (3, (4, 1, 3))
    assert some.id.weights_sha256 == whole.id.weights_sha256


def test_cells_and_features_are_of_the_chosen_classes_too(load, views):
    given = {"num_classes": 2, "scales": (1, 2), "want_features": True}
    some = load(classes=[7, 2], num_classes=10, given=given)
    whole = load(given={"scales": (1, 2)})
    cells = some.answer(views)
    np.testing.assert_allclose(cells, whole.answer(views)[..., [7, 2]], rtol=1e-5, atol=1e-6)
    logits = some.features(views) @ some.head.weight_CD.T + some.head.bias_C
    np.testing.assert_allclose(logits, cells, rtol=1e-4, atol=1e-5)


def test_the_network_keeps_its_own_outputs_where_some_are_chosen(load, views):
    teacher = load("resnet8x4", classes=[99, 0], given={"num_classes": 2})  # made for 100 classes
    assert teacher.answer(views).shape == (6, 1, 2)


def test_an_output_that_the_network_does_not_have_is_refused(load):
    with pytest.raises(ConfigError, match=r"names output 10, and teacher .* has outputs 0 to 9"):
        load(classes=[10, 1], num_classes=10, given={"num_classes": 2})


def test_a_teacher_of_more_classes_is_pointed_to_the_setting(load, factories):
    with pytest.raises(ConfigError, match=r"teacher\.classes, by index, file or name"):
        load(f"{factories}:five", given={"num_classes": 4})
