"""Observers hear of every request once, in order, and at most a moment late."""

from __future__ import annotations

import asyncio

import pytest

from cache_service.api.batch import HOLD_SECONDS, MAX_HELD, Batch
from cache_service.api.observe import Seen


def seen(number: int) -> Seen:
    return Seen(str(number), "GET", "/x", 200, "", 0.1, 5, "127.0.0.1", {}, float(number))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def told():
    return []


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def batch(told, clock):
    return Batch((lambda held: told.append([each.request_id for each in held]),), clock=clock)


def test_a_request_after_a_pause_is_told_of_at_once(batch, told, clock):
    batch.observe([seen(0)])
    clock.now += HOLD_SECONDS
    batch.observe([seen(1)])
    assert told == [["0"], ["1"]]


def test_requests_that_follow_closely_are_told_of_together_by_the_clock(told):
    async def run():
        batch = Batch((lambda held: told.append([each.request_id for each in held]),))
        for number in range(5):
            batch.observe([seen(number)])
        assert told == [["0"]]
        await asyncio.sleep(5 * HOLD_SECONDS)

    asyncio.run(run())
    assert told == [["0"], ["1", "2", "3", "4"]]


def test_a_flush_tells_all_that_is_held_and_the_timer_nothing_twice(told):
    async def run():
        batch = Batch((lambda held: told.append([each.request_id for each in held]),))
        for number in range(3):
            batch.observe([seen(number)])
        batch.flush()
        await asyncio.sleep(5 * HOLD_SECONDS)

    asyncio.run(run())
    assert told == [["0"], ["1", "2"]]


def test_no_more_are_held_than_a_batch_has(told, clock):
    async def run():
        batch = Batch((lambda held: told.append(len(held)),), clock=clock)
        for number in range(2 * MAX_HELD + 1):
            batch.observe([seen(number)])

    asyncio.run(run())
    assert told == [1, MAX_HELD, MAX_HELD]
