from __future__ import annotations

import pytest

from distill.losses.schedules import constant, cosine, linear, warm_up


@pytest.mark.parametrize("epoch", [0.0, 0.5, 100.0])
def test_a_constant_is_constant(epoch):
    assert constant(epoch, value=4.0) == 4.0


@pytest.mark.parametrize(
    ("epoch", "value"), [(-1, 20), (0, 20), (2.5, 16), (5, 12), (10, 4), (11, 4)]
)
def test_a_line_goes_from_start_to_end_and_stays(epoch, value):
    assert linear(epoch, start=20, end=4, epochs=10) == pytest.approx(value)


@pytest.mark.parametrize(
    ("epoch", "value"), [(0, 20), (2.5, 17.65685424949238), (5, 12), (10, 4), (11, 4)]
)
def test_a_cosine_is_flat_at_both_ends(epoch, value):
    assert cosine(epoch, start=20, end=4, epochs=10) == pytest.approx(value)


@pytest.mark.parametrize(("epoch", "value"), [(0, 0), (1, 0.05), (19, 0.95), (20, 1), (240, 1)])
def test_warm_up_is_the_smaller_of_epoch_over_20_and_1(epoch, value):
    assert warm_up(epoch) == pytest.approx(value)


def test_a_schedule_of_no_length_is_over():
    assert warm_up(0.0, epochs=0) == 1.0
    assert linear(0.0, start=20, end=4, epochs=0) == 4.0
    assert cosine(0.0, start=20, end=4, epochs=0) == pytest.approx(4.0)
