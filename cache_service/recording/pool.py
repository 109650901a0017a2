"""Starts and supervises the worker processes of a recording.

`kd-cache build` supervises its workers with `RecordingWorker`. The build queue of the service only
starts them here. `cache_service.recording.worker` describes the program of a worker and its
messages. This module does not import torch.
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
"""Time that a worker has to finish its shard after SIGTERM, seconds."""


def job_message(config: BuildConfig, seeds: Sequence[int], part: Part = WHOLE) -> dict[str, Any]:
    """Make the first message to a worker, which describes the build and the worker's shards."""
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
    """A worker on this machine, whose process is restarted if it dies or stalls.

    Attributes:
        progress: latest report of the current process; None before the first one.
        committed: number of shards that all its processes have committed.
        is_done: whether its part is recorded completely.
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
        """Read the reports of the worker, and restart its process if it died or stalled.

        Raises:
            KdCacheError: the worker reported an error, or its process died repeatedly.
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
        """Send SIGTERM, after which the process finishes its current shard and exits."""
        self._supervisor.process.terminate()

    def stop(self) -> None:
        """Stop the process. The next run records the shards that are not committed."""
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
