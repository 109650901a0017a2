"""Processes share a recorded epoch evenly, in slices of its order, whatever their number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.errors import ConfigError
from cache_service.rows.sampler import PositionSampler
from distill.batches import BatchPlan

COUNTS = st.integers(1, 200)
WORLDS = st.integers(1, 5)


@given(COUNTS, WORLDS, st.none() | COUNTS, st.booleans())
def test_ranks_read_each_position_once_and_equally_many_and_leave_out_few(
    num_samples, world, batch_size, pairs
):
    unit = 2 if pairs and world > 1 else 1
    if num_samples < world * unit or (batch_size or unit) % unit:
        return
    ranks = [
        PositionSampler(num_samples, rank, world, batch_size=batch_size, pairs=pairs)
        for rank in range(world)
    ]
    read = [list(each) for each in ranks]
    assert {len(each) for each in read} == {len(ranks[0])}
    for positions in read:
        assert positions == sorted(positions)
        assert not pairs or world == 1 or {p ^ 1 for p in positions} == set(positions)
    union = sorted(position for positions in read for position in positions)
    assert len(set(union)) == len(union)
    # At most one view per rank, or one that would be cut from its pair.
    assert 0 <= num_samples - len(union) < world * 2


@given(st.integers(1, 10), COUNTS, st.integers(1, 4))
def test_slices_of_whole_steps_are_those_of_kd_cache_train(num_steps, pairs, world):
    num_samples = num_steps * 2 * pairs * world
    for rank in range(world):
        plan = BatchPlan(num_samples, 2 * pairs * world, (0,), 1, rank, world, min_views=2)
        expected = [plan.cursor(step)[3:] for step in range(plan.num_steps)]
        sampler = PositionSampler(num_samples, rank, world, batch_size=2 * pairs)
        assert list(sampler.slices()) == expected


def test_without_a_batch_size_each_rank_reads_one_part_so_that_shards_are_read_once():
    assert list(PositionSampler(11, 0, 2)) == [0, 1, 2, 3, 4]
    assert list(PositionSampler(11, 1, 2)) == [5, 6, 7, 8, 9]
    assert list(PositionSampler(11, 1, 2, pairs=True)) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((10, 2, 2), {}, "rank 2 of 2 processes.*ranks are 0 to 1"),
        ((10, -1, 2), {}, "rank -1 of 2"),
        ((10, 0, 0), {}, "rank 0 of 0"),
        ((10, 0, 1), {"batch_size": 0}, "batch_size=0"),
        ((10, 0, 2), {"batch_size": 3, "pairs": True}, "would cut pairs.*Use an even batch_size"),
        ((3, 0, 4), {}, "3 positions cannot be divided among 4"),
        ((3, 0, 2), {"pairs": True}, "3 positions cannot be divided among 2"),
    ],
)
def test_what_no_process_could_read_is_refused(arguments, options, said):
    with pytest.raises(ConfigError, match=said):
        PositionSampler(*arguments, **options)


def test_a_cache_gives_the_sampler_of_its_epochs(cache):
    assert list(cache.sampler(1, 2)) == list(range(721, 1442))
    assert list(cache.sampler(1, 2, batch_size=500)) == [*range(500, 1000), *range(1221, 1442)]
