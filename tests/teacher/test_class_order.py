from __future__ import annotations

import numpy as np
import pytest

from cache_service.teacher.class_order import find_other_order

HUNDRED = tuple(sorted(str(number) for number in range(100)))
"""Folders named by numbers, as a folder is read: 0, 1, 10, 11, ..., 2."""


def answers(outputs, *, per_class=5, accuracy=1.0, seed=0):
    """Predictions and labels of a teacher that answers `outputs[label]`, or a random class."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(outputs)), per_class)
    right = random.random(len(labels)) < accuracy
    guesses = random.integers(0, len(outputs), len(labels))
    order = random.permutation(len(labels))
    return np.where(right, np.asarray(outputs)[labels], guesses)[order], labels[order]


def found(outputs, *, names=(), **options):
    return find_other_order(*answers(outputs, **options), names=names, num_classes=len(outputs))


@pytest.mark.parametrize("accuracy", [0.3, 0.6, 1.0])
def test_numbered_folders_under_a_teacher_of_numbers_are_called_natural_order(accuracy):
    other = found([int(name) for name in HUNDRED], names=HUNDRED, accuracy=accuracy)
    assert other.description == "the same names in natural order (0, 1, 2, ...)"
    assert other.accuracy > 0.8 * accuracy
    assert "dataset.classes: natural" in other.hint


@pytest.mark.parametrize(
    ("names", "learned", "words"),
    [
        (("class 1", "class 2", "class 10"), ("class 1", "class 10", "class 2"), "as text"),
        (("Ant", "Cow", "bee"), ("Ant", "bee", "Cow"), "in natural order"),
        (("Ant 2", "Cow", "ant 10"), ("ant 10", "Ant 2", "Cow"), "without regard to case"),
    ],
)
def test_other_sorts_of_the_names_are_called_by_their_name(names, learned, words):
    other = found([learned.index(name) for name in names], names=names)
    assert words in other.description


def test_labels_by_number_under_a_teacher_of_numbers_as_text_are_recognized_without_names():
    other = found([HUNDRED.index(str(label)) for label in range(100)])
    assert "class numbers sorted as text" in other.description
    assert "Renumber" in other.hint


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (np.arange(20)[::-1], "in reverse order"),
        (np.arange(20) + 1, "one output later"),
        (np.maximum(np.arange(20) - 1, 0), "one output earlier"),
    ],
)
def test_reversed_and_shifted_classes_are_called_so(outputs, words):
    assert words in found(outputs, per_class=4).description


@pytest.mark.parametrize("per_class", [4, 30])
def test_two_exchanged_classes_of_ten_are_found_and_named(per_class):
    outputs = [0, 1, 2, 5, 4, 3, 6, 7, 8, 9]
    names = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    other = found(outputs, names=names, per_class=per_class, accuracy=0.95)
    assert other is not None
    assert "'dog' for 'cat'" in other.description
    assert "'cat' for 'dog'" in other.description


def test_any_permutation_is_found_though_most_classes_have_two_samples():
    outputs = np.arange(1000)
    outputs[:600] = np.random.default_rng(1).permutation(600)
    assert "another order" in found(outputs, per_class=2, accuracy=0.9).description


def test_outputs_beyond_the_datasets_classes_are_named_by_number():
    other = found([4, 1, 3], names=("apple", "leaf", "sky"))
    assert "4 for 'apple'" in other.description


@pytest.mark.parametrize("accuracy", [0.15, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000])
def test_a_weak_teacher_of_the_datasets_order_is_not_suspected(classes, accuracy):
    names = tuple(sorted(str(number) for number in range(classes)))
    for seed in range(5):
        per_class = 5 if classes == 100 else 2 if classes == 1000 else 40
        options = {"per_class": per_class, "accuracy": accuracy, "seed": seed}
        assert found(np.arange(classes), names=names, **options) is None


def test_a_teacher_that_never_answers_one_class_is_not_suspected():
    for rare in (10, 40, 200):
        labels = np.repeat([0, 1, 2], [rare, 40, 40])
        predictions = np.where(labels == 0, 1, labels)
        assert find_other_order(predictions, labels, num_classes=3) is None


def test_a_teacher_that_always_answers_the_same_is_not_suspected():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    assert find_other_order(np.full(100, 2), labels, num_classes=3) is None


def test_classes_that_are_often_taken_for_each_other_are_not_suspected():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 50)
    confused = np.where(random.random(500) < 0.5, labels, labels ^ 1)
    assert find_other_order(confused, labels, num_classes=10) is None
