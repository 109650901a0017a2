"""Processes that train one way each: the memory of a way is then its own.

All start at once, at the beginning, and load their libraries beside the teacher's training. Then
each waits for its job, so that nothing is loading while something is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from cache_service.errors import KdCacheError, error_from_document
from cache_service.processes import INTERRUPTED, ChildProcess, module_command
from cli.experiments.demo.way import Measured, OnEpoch, WayJob

STOP_S = 20.0
"""How long a child may take to finish its step and save it, before it is killed."""


class Children:
    """So many fresh processes; each takes one job. A context: at its end none is left."""

    def __init__(self, count: int, *, threads: int) -> None:
        self._count = count
        self._threads = threads
        self._waiting: list[ChildProcess] = []

    def __enter__(self) -> Self:
        self._waiting = [_start(self._threads) for _ in range(self._count)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _stop(self._waiting)

    def measure(self, job: WayJob, on_epoch: OnEpoch) -> Measured:
        """The job's measurement, from a process that has done nothing else.

        Raises:
            KeyboardInterrupt: this process was told to stop; the child has stopped before.
            KdCacheError: what the child refused, or that it died.
        """
        child = self._waiting.pop(0)
        try:
            child.send(job.model_dump(mode="json"))
            last = _last_message(child, on_epoch)
            status = child.wait()
        finally:
            _stop([child])
        if "measured" in last:
            return Measured.model_validate(last["measured"])
        if "error" in last:
            raise error_from_document(last["error"])
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        raise KdCacheError(
            f"the process that trained into {job.train.out} ended with status {status}; its "
            "messages are above."
        )


def _start(threads: int) -> ChildProcess:
    return ChildProcess(
        module_command("cli.experiments.demo.way"),
        environment={"OMP_NUM_THREADS": str(threads)},
    )


def _last_message(child: ChildProcess, on_epoch: OnEpoch) -> dict[str, Any]:
    """The last message; epochs are passed on."""
    while (message := child.receive()) is not None:
        if "epoch" not in message:
            return message
        on_epoch(*message["epoch"])
    return {}


def _stop(children: Sequence[ChildProcess]) -> None:
    for child in children:
        child.terminate()
    for child in children:
        child.stop(STOP_S)
