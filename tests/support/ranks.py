"""Several processes that train together, as torchrun starts them, without its seconds of start."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from support.sockets import free_port

TIMEOUT_S = 100.0

PRELOADED = ["support.streams", "distill.trainer", "torch.distributed"]


class Started:
    """Processes of all ranks, which run the same function."""

    def __init__(self, world: int, work: Callable[..., Any], *arguments: Any) -> None:
        # The server has imported torch but never run it: its children start fast and threadless.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._answers = context.SimpleQueue()
        port = free_port()
        self.processes = [
            context.Process(
                target=_as_rank, args=(rank, world, port, self._answers, work, arguments)
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def codes(self) -> list[int | None]:
        """How the processes ended; any that still runs is killed."""
        for process in self.processes:
            process.join(TIMEOUT_S)
        self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """kill -9 of all."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def one_answer(self) -> tuple[int, Any]:
        """The rank that is the first to return, and what it returned or raised."""
        rank, answer = self._answers.get()
        return rank, answer

    def answers(self) -> list[Any]:
        """What the function returned or raised on each rank, in order of rank."""
        answers = {}
        for _ in self.processes:
            rank, answer = self._answers.get()
            answers[rank] = answer
        self.codes()
        return [answers[rank] for rank in sorted(answers)]


def run_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function returns, or the error that it raises, on each of several ranks."""
    return Started(world, work, *arguments).answers()


def _as_rank(
    rank: int, world: int, port: int, answers: Any, work: Callable[..., Any], arguments: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        answer = work(*arguments)
    except BaseException as error:  # noqa: BLE001 - handed to the test
        answer = error
    answers.put((rank, answer))
