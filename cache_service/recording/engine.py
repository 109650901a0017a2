"""Run a build: in this process, or in several on this machine.

Every engine does the same thing, `record` over a part of the shards, which may be repeated, killed
and resumed at will. So an engine is free to run a part again whenever it doubts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from cache_service.format.group import ROOT_KEY
from cache_service.interrupts import stop_on_signal
from cache_service.recording.checks import check_teacher
from cache_service.recording.config import BuildConfig
from cache_service.recording.jobs import WHOLE, Part
from cache_service.recording.opened import OpenedBuild, resolve_device
from cache_service.recording.pool import RecordingWorker
from cache_service.recording.progress import OnProgress, Progress
from cache_service.recording.record import open_writer, record
from cache_service.storage import open_storage
from cache_service.teacher.score import require_trained

POLL_S = 0.2
"""How often the worker processes are checked."""


def prepare(build: OpenedBuild, *, say: Callable[[str], None] = lambda _: None) -> None:
    """Make or extend the cache, after checks of the teacher that cost a few batches.

    Where something is left to record, the teacher must answer repeatably, and must answer views
    that are recorded already as it did. A new cache also needs a score above chance.

    Raises:
        UnsupportedError: the teacher answers the same views differently.
        UntrainedTeacherError: the teacher scores like chance.
        SpecMismatchError: another cache is there, or one of another teacher.
    """
    say(f"teacher: {build.config.teacher.model}, {build.teacher.weights_from}")
    check_teacher(build)
    if open_storage(build.config.cache).get(ROOT_KEY) is None:
        score = build.score()
        say(
            f"teacher: {score.accuracy:.1%} of {score.num_samples} samples right "
            f"(chance {score.chance:.1%})"
        )
        require_trained(score, build.config.teacher)
    open_writer(build)


def run_local(
    build: OpenedBuild,
    *,
    seeds: tuple[int, ...],
    part: Part = WHOLE,
    on_progress: OnProgress = lambda _: None,
) -> int:
    """Record a part with `config.processes` worker processes. Returns the shards committed.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is committed stays.
        KdCacheError: whatever stopped a worker.
    """
    if build.config.processes == 1:
        return record(build, open_writer(build), seeds=seeds, part=part, on_progress=on_progress)
    workers = _start_workers(build.config, seeds, part)
    try:
        with stop_on_signal() as stop:
            while not all(worker.is_done for worker in workers):
                if stop.requested:
                    raise KeyboardInterrupt
                time.sleep(POLL_S)
                for worker in workers:
                    worker.check()
                on_progress(_total([worker.progress for worker in workers if worker.progress]))
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.stop()
        open_storage(build.config.cache).sweep()
    return sum(worker.committed for worker in workers)


def _start_workers(
    config: BuildConfig, seeds: tuple[int, ...], part: Part
) -> list[RecordingWorker]:
    """One worker for each share of a part; GPUs are given out in turn."""
    count, device = config.processes, resolve_device(config.device)
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    return [
        RecordingWorker(
            config.model_copy(update={"device": f"cuda:{number % gpus}" if gpus else device}),
            seeds,
            Part(part.index + part.count * number, part.count * count),
        )
        for number in range(count)
    ]


def _total(parts: list[Progress]) -> Progress:
    if not parts:
        return Progress(0, 0, 0, 0, 0, 0, 0, 0, 0.0)
    counts = (
        "rows_done",
        "rows_total",
        "shards_done",
        "shards_total",
        "shards_committed",
        "bytes_written",
        "rows_per_s",
    )
    return replace(
        parts[-1], **{name: sum(getattr(part, name) for part in parts) for name in counts}
    )
