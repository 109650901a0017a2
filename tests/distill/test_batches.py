"""The batches of a run are arithmetic: a function of step and rank, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.batches import BatchPlan

SIZES = st.integers(1, 200)


@given(SIZES, SIZES, st.integers(1, 5), st.integers(1, 3))
def test_ranks_tile_each_epoch_in_order_and_drop_less_than_one_view_each(
    num_samples, batch_size, world, epochs
):
    if num_samples < world:
        return
    plans = [
        BatchPlan(num_samples, batch_size, (4, 7), epochs, rank, world) for rank in range(world)
    ]
    assert len({plan.num_steps for plan in plans}) == 1
    expected = 0
    for step in range(plans[0].steps_per_epoch):
        cursors = [plan.cursor(step) for plan in plans]
        for cursor in cursors:
            assert cursor.start == expected
            assert 1 <= cursor.stop - cursor.start <= batch_size
            expected = cursor.stop
        assert len({cursor.stop - cursor.start for cursor in cursors}) == 1
    assert 0 <= num_samples - expected < world


def test_epochs_use_the_seeds_in_turn_and_begin_again():
    plan = BatchPlan(10, 5, (3, 8), 5)
    seeds = [plan.cursor(step).seed for step in range(plan.num_steps)]
    assert seeds == [3, 3, 8, 8, 3, 3, 8, 8, 3, 3]
    assert [plan.cursor(step).epoch for step in range(10)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(("num_samples", "steps"), [(65, 1), (66, 2), (64, 1), (128, 2)])
def test_a_last_step_of_one_view_is_left_out_where_a_network_trains(num_samples, steps):
    plan = BatchPlan(num_samples, 64, (0,), 1, min_views=2)
    assert plan.steps_per_epoch == steps
    assert BatchPlan(65, 64, (0,), 1).steps_per_epoch == 2


def test_a_dataset_smaller_than_a_batch_is_one_step():
    plan = BatchPlan(3, 64, (0,), 2, min_views=2)
    assert plan.num_steps == 2
    assert plan.cursor(1)[3:] == (0, 3)
