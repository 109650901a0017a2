"""A worker: a process that records one part of a build.

`RecordingWorker` starts it from `kd-cache build` with several processes. The build queue of the
service starts it with `start_worker` and supervises it itself. The program is
`python -m cache_service.recording.worker`; its messages are

- to the worker: the job (see `job_message`), then `{"prioritize": [[seed, shard], ...]}`;
- from the worker: `{"progress": {...}}`, and last `{"done": true}` or `{"error": {...}}`.

On SIGTERM, and when its parent is gone, it commits the shard that it is writing and ends.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cache_service.errors import ConfigError, KdCacheError, StorageError, error_from_document
from cache_service.processes import (
    INTERRUPTED,
    ChildProcess,
    ParentConnection,
    Supervisor,
    module_command,
)
from cache_service.recording.config import BuildConfig
from cache_service.recording.jobs import WHOLE, Part, Shard
from cache_service.recording.order import ShardOrder
from cache_service.recording.progress import Progress

COMMAND = module_command("cache_service.recording.worker")

STOP_S = 20.0
"""Time for a worker that was asked to end to finish the shard that it is writing."""

REPORT_S = 0.2
"""Least time between two reports of progress, except after a committed shard."""


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


def main() -> int:
    """Record what the parent asks for. Returns the exit status."""
    parent = ParentConnection()
    job = parent.receive()
    if job is None:
        return INTERRUPTED
    order = ShardOrder()
    threading.Thread(target=_listen, args=(parent, order), daemon=True).start()
    try:
        _record(job, order, parent)
    except KdCacheError as refusal:
        parent.send({"error": refusal.as_document()})
        return refusal.exit_code
    except KeyboardInterrupt:  # SIGTERM, once the shard being written is committed
        return INTERRUPTED
    parent.send({"done": True})
    return 0


def _record(job: dict[str, Any], order: ShardOrder, parent: ParentConnection) -> None:
    try:  # here, because the parent reads this file too, and a server does not load torch
        from cache_service.recording.engine import prepare
        from cache_service.recording.opened import open_build
        from cache_service.recording.record import open_writer, record
    except ImportError as missing:
        raise ConfigError(
            f"this server cannot run builds: {missing}.", hint="pip install 'kd-cache[train]'"
        ) from missing
    build = open_build(BuildConfig.model_validate(job["config"]))
    prepare(build)
    record(
        build,
        open_writer(build),
        seeds=tuple(job["seeds"]),
        part=Part(*job["part"]),
        on_progress=_ProgressReporter(parent),
        order=order,
    )


class _ProgressReporter:
    """Sends progress to the parent, and not more often than it needs to know."""

    def __init__(self, parent: ParentConnection) -> None:
        self._parent = parent
        self._reported_s = 0.0
        self._committed = -1

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.shards_committed == self._committed and now - self._reported_s < REPORT_S:
            return
        self._reported_s, self._committed = now, progress.shards_committed
        self._parent.send({"progress": asdict(progress) | {"eta_s": progress.eta_s}})


def _listen(parent: ParentConnection, order: ShardOrder) -> None:
    for message in parent.messages():
        for seed, shard in message["prioritize"]:
            order.front(Shard(seed, shard))
    # The parent is gone.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
