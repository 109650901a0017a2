"""The batches of a run are arithmetic: a function of step and rank, and nothing else."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.batches import BatchPlan

SIZES = st.integers(1, 200)
WORLDS = st.integers(1, 8)


def plans_of(num_samples, batch_size, world, epochs=2):
    return [
        BatchPlan(num_samples, batch_size, (4, 7), epochs, rank, world, min_views=2)
        for rank in range(world)
    ]


@given(SIZES, SIZES, WORLDS)
def test_the_slices_of_the_ranks_are_the_batch_of_one_process_in_order(
    num_samples, batch_size, world
):
    (alone,) = plans_of(num_samples, batch_size, 1)
    plans = plans_of(num_samples, batch_size, world)
    assert {plan.num_steps for plan in plans} == {alone.num_steps}
    for step in range(alone.num_steps):
        whole, parts = alone.cursor(step), [plan.cursor(step) for plan in plans]
        assert {part[:3] for part in parts} == {whole[:3]}
        if whole.stop - whole.start < 2 * world:
            assert parts == [whole] * world  # too few to divide: all ranks read them
        else:
            assert (parts[0].start, parts[-1].stop) == (whole.start, whole.stop)
            assert all(one.stop == other.start for one, other in pairwise(parts))


@given(SIZES, SIZES, WORLDS)
def test_slices_never_cut_a_pair_and_differ_by_three_views_at_most(num_samples, batch_size, world):
    for plan in plans_of(num_samples, batch_size, world):
        for step in range(plan.steps_per_epoch):
            bounds = plan.bounds(step)
            assert all(bound % 2 == 0 for bound in bounds[1:-1])
            sizes = [stop - start for start, stop in pairwise(bounds)]
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= 3


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
