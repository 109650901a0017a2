"""Worker processes of a recording: how they are started, and a pool of them on this machine.

The workers are supervised here for `kd-cache build` with several processes, and by the build queue
of the service. Their program and its messages are described in `cache_service.recording.worker`.
Nothing here loads torch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from cache_service.errors import StorageError, error_from_document
from cache_service.processes import ChildProcess, Supervisor, module_command
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.shards import WHOLE, Part, Progress

COMMAND = module_command("cache_service.recording.worker")

STOP_S = 20.0
"""Time for a worker that was asked to end to finish the shard that it is writing."""


def job_message(config: BuildConfig, seeds: Sequence[int], part: Part = WHOLE) -> dict[str, Any]:
    """The first message to a worker: which shards of which build it records."""
    return {
        "config": config.model_dump(mode="json"),
        "seeds": list(seeds),
        "part": [part.index, part.count],
    }


def start_worker(
    job: dict[str, Any],
    *,
    command: Sequence[str] = COMMAND,
    log: logging.Logger | None = None,
) -> ChildProcess:
    """Start a worker. Raises OSError if no process can be started."""
    return ChildProcess(command, first_message=job, log=log)


class RecordingWorker:
    """One worker of a pool on this machine, replaced when it dies or stalls.

    Attributes:
        progress: its latest report; None until there is one.
        committed: shards committed by all its processes.
        is_done: whether its part is recorded.
    """

    def __init__(
        self,
        config: BuildConfig,
        seeds: Sequence[int],
        part: Part,
        *,
        command: Sequence[str] = COMMAND,
    ) -> None:
        job = job_message(config.model_copy(update={"processes": 1}), seeds, part)
        self._part = part
        self._supervisor = Supervisor(
            lambda: start_worker(job, command=command), stall_s=config.stall_s
        )
        self._committed_before = 0
        self.progress: Progress | None = None
        self.committed = 0
        self.is_done = False

    def check(self) -> None:
        """Take in its reports, and replace its process if that died or stalled.

        Raises:
            KdCacheError: it refused, or it keeps dying.
        """
        report = self._supervisor.report()
        for message in report.messages:
            self._take(message)
        if report.failure is None or self.is_done:
            return
        self.progress, self._committed_before = None, self.committed
        if not self._supervisor.restart():
            raise StorageError(
                f"worker {self._part.index} of {self._part.count} failed "
                f"{self._supervisor.deaths} times without committing a shard ({report.failure}).",
                hint="Run with `--set processes=1` to see why.",
            )

    def terminate(self) -> None:
        """Ask its process to finish the shard that it is writing and end."""
        self._supervisor.process.terminate()

    def stop(self) -> None:
        """End its process. What is not committed is recorded by the next run."""
        self._supervisor.process.stop(STOP_S)

    def _take(self, message: dict[str, Any]) -> None:
        if "error" in message:
            raise error_from_document(message["error"])
        if "progress" in message:
            report = dict(message["progress"])
            del report["eta_s"]
            self.progress = Progress(**report)
            self.committed = self._committed_before + self.progress.shards_committed
            self._supervisor.note_progress(self.progress.shards_done)
        self.is_done |= "done" in message
