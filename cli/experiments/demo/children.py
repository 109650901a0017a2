"""Processes that train one way each: the memory of a way is then its own.

All start at once, at the beginning, and load their libraries beside the teacher's training. Then
each waits for its job, so that nothing is loading while something is timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any, Self

from cache_service.errors import KdCacheError
from cli.experiments.demo.way import INTERRUPTED, Measured, OnEpoch, WayJob

STOP_S = 20.0
"""How long a child may take to finish its step and save it, before it is killed."""


class Children:
    """So many fresh processes; each takes one job. A context: at its end none is left."""

    def __init__(self, count: int, *, threads: int) -> None:
        self._count = count
        self._threads = threads
        self._waiting: list[subprocess.Popen[str]] = []

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
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            _hand_over(child.stdin, job)
            told = _listen(child.stdout, on_epoch)
            status = child.wait()
        finally:
            _stop([child])
        if "measured" in told:
            return Measured.model_validate(told["measured"])
        if "refused" in told:
            raise _refusal(**told["refused"])
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        raise KdCacheError(
            f"the process that trained into {job.train.out} ended with status {status}; what it "
            "said is above."
        )


def _start(threads: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        # -P: a folder named cli where the user stands must not be taken for ours.
        [sys.executable, "-P", "-m", "cli.experiments.demo.way"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        # Ctrl-C goes to the whole group: the children are told by us, once.
        process_group=0,
    )


def _hand_over(stdin: IO[str], job: WayJob) -> None:
    try:
        stdin.write(job.model_dump_json())
        stdin.close()
    except BrokenPipeError:  # it has died; its status tells more than this does
        return


def _listen(stdout: IO[str], on_epoch: OnEpoch) -> dict[str, Any]:
    """The last message; epochs are passed on."""
    for line in stdout:
        told: dict[str, Any] = json.loads(line)
        if "epoch" not in told:
            return told
        on_epoch(*told["epoch"])
    return {}


def _stop(children: Sequence[subprocess.Popen[str]]) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
    for child in children:
        with child:
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()


def _refusal(code: str, message: str, hint: str) -> KdCacheError:
    kinds = {kind.code: kind for kind in KdCacheError.__subclasses__()}
    return kinds.get(code, KdCacheError)(message, hint=hint)
