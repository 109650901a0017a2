"""The bias of an omitted class: the search is exact, and never makes things worse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.experiments.reproduce.hinton import choose_raise, count_errors


def random_answers(seed, num_samples=60, num_classes=4, coarse=False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_samples)
    logits = rng.normal(size=(num_samples, num_classes)).astype(np.float32)
    logits[np.arange(num_samples), labels] += 2
    logits[:, 1] -= rng.uniform(-1, 6)
    return (np.round(logits) if coarse else logits), labels


@given(seed=st.integers(0, 10_000), coarse=st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_other_raise_makes_fewer_errors(seed, coarse):
    logits, labels = random_answers(seed, coarse=coarse)
    chosen = choose_raise(logits, labels, label=1)
    found = count_errors(logits, labels, label=1, raised=chosen).total
    assert chosen >= 0
    # On a grid of odd offsets no coarse logit ties with another one.
    for raised in np.concatenate([[0.0], np.arange(0.003, 12, 0.05)]):
        assert found <= count_errors(logits, labels, label=1, raised=float(raised)).total


def test_a_class_that_is_held_down_comes_back():
    logits = np.array([[0, -3.0], [0, -3.5], [9, -3.0]], np.float32)
    labels = np.array([1, 1, 0])
    assert count_errors(logits, labels, label=1) == (2, 2)
    raised = choose_raise(logits, labels, label=1)
    assert 3.5 < raised < 12
    assert count_errors(logits, labels, label=1, raised=raised) == (0, 0)


def test_a_class_that_nothing_is_wrong_with_is_left_alone():
    logits = np.array([[2, 0.0], [0, 1.0]], np.float32)
    assert choose_raise(logits, np.array([0, 1]), label=1) == 0


def test_where_all_samples_are_of_the_class_all_come_right():
    logits = np.array([[5, 0.0], [7, 0.0]], np.float32)
    raised = choose_raise(logits, np.array([1, 1]), label=1)
    assert count_errors(logits, np.array([1, 1]), label=1, raised=raised).total == 0


@pytest.mark.parametrize("raised", [0.0, 1.5])
def test_errors_are_those_of_the_shifted_logits(raised):
    logits, labels = random_answers(3)
    shifted = logits.copy()
    shifted[:, 1] += raised
    wrong = shifted.argmax(1) != labels
    found = count_errors(logits, labels, label=1, raised=raised)
    assert found == (wrong.sum(), (wrong & (labels == 1)).sum())
