"""Learning rates, value by value."""

from __future__ import annotations

import math

import pytest

from distill.optim import Constant, Cosine, MultiStep, learning_rate


def rates(schedule, *, epochs=4, updates_per_epoch=5, peak=2.0):
    return [
        learning_rate(
            schedule, update, peak=peak, updates_per_epoch=updates_per_epoch, epochs=epochs
        )
        for update in range(epochs * updates_per_epoch)
    ]


def test_constant_is_constant():
    assert rates(Constant()) == [2.0] * 20


def test_cosine_starts_at_the_peak_and_ends_just_above_its_minimum():
    found = rates(Cosine(min_lr=0.5))
    assert found[0] == 2.0
    assert found[10] == pytest.approx(1.25)
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi * 19 / 20)))


def test_multistep_drops_after_each_milestone_and_not_before():
    found = rates(MultiStep(milestones=(1, 3), gamma=0.1))
    assert found == pytest.approx([2.0] * 5 + [0.2] * 10 + [0.02] * 5)


def test_a_milestone_beyond_the_end_never_acts():
    assert rates(MultiStep(milestones=(150,))) == [2.0] * 20


def test_warm_up_climbs_straight_and_never_wastes_an_update_at_zero():
    found = rates(Constant(warmup_epochs=1))
    assert found[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])


def test_warm_up_may_end_within_an_epoch():
    found = rates(Constant(warmup_epochs=0.5))
    assert found[:4] == pytest.approx([0.8, 1.6, 2.0, 2.0])


def test_cosine_after_warm_up_begins_at_the_peak():
    found = rates(Cosine(warmup_epochs=1))
    assert found[5] == 2.0
    assert found[-1] == pytest.approx(1 + math.cos(math.pi * 14 / 15))


def test_milestones_count_epochs_of_the_run_warm_up_included():
    found = rates(MultiStep(milestones=(2,), warmup_epochs=1))
    assert found[9:11] == pytest.approx([2.0, 0.2])
