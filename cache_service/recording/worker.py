"""The program of a worker process, which records a part of a build.

`python -m cache_service.recording.worker` is started by `cache_service.recording.pool`. Messages
are JSON objects:

- to the worker: the job (see `pool.job_message`), then `{"prioritize": [[seed, shard], ...]}`;
- from the worker: `{"progress": {...}}`, and last `{"done": true}` or `{"error": {...}}`.

After SIGTERM, or if its parent process has exited, it commits the shard that it is writing and
exits.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

from cache_service.errors import ConfigError, KdCacheError
from cache_service.processes import INTERRUPTED, ParentConnection
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.shards import Part, Progress, Shard, ShardOrder

REPORT_S = 0.2
"""Smallest interval of progress reports, seconds. A committed shard is reported at once."""

ORPHAN_S = 20.0
"""Time to finish the current shard after the parent process has exited, seconds."""


def main() -> int:
    """Record the part that the parent process requests, and return the exit status."""
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
    except KeyboardInterrupt:  # SIGTERM; the shard that was being written is committed
        return INTERRUPTED
    parent.send({"done": True})
    return 0


def _record(job: dict[str, Any], order: ShardOrder, parent: ParentConnection) -> None:
    try:  # imported here so that a missing library is reported to the parent
        from cache_service.recording.context import open_build
        from cache_service.recording.engines import prepare
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
    """Sends progress to the parent process, at most every `REPORT_S` seconds between commits."""

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
            order.prioritize(Shard(seed, shard))
    # The messages end when the parent process has exited.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
