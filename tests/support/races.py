"""Processes that race for one object. Here, because a started process imports what it runs."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

from cache_service.storage import open_storage

TIMEOUT_S = 60.0


def winners_of_each_round(url: str, *, processes: int, rounds: int) -> list[list[int]]:
    """Who says to have created the object of each round, when all try at once."""
    # A fork server keeps the environment it was started in, which may lack the credentials.
    environment = {name: text for name, text in os.environ.items() if name.startswith("AWS_")}
    context = multiprocessing.get_context("forkserver")
    barrier, said = context.Barrier(processes, timeout=TIMEOUT_S), context.Queue()
    racers = [
        context.Process(target=_race, args=(url, number, rounds, environment, barrier, said))
        for number in range(processes)
    ]
    for racer in racers:
        racer.start()
    winners: list[list[int]] = [[] for _ in range(rounds)]
    for _ in racers:
        number, won = said.get(timeout=TIMEOUT_S)
        for each in won:
            winners[each].append(number)
    for racer in racers:
        racer.join(TIMEOUT_S)
        assert racer.exitcode == 0
    return winners


def content(number: int) -> bytes:
    """What racer `number` writes: long enough to be caught half-written."""
    return bytes([number]) * 200_000


def _race(
    url: str,
    number: int,
    rounds: int,
    environment: dict[str, str],
    barrier: Barrier,
    said: Queue[tuple[int, list[int]]],
) -> None:
    os.environ.update(environment)
    storage = open_storage(url)
    won = []
    for each in range(rounds):
        barrier.wait()
        if storage.create(f"commits/{each}.json", content(number)):
            won.append(each)
        # Whoever lost must already see the winner's object, whole.
        assert len(storage.get(f"commits/{each}.json") or b"") == len(content(number))
    storage.sweep()
    said.put((number, won))
