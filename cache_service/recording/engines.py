"""Runs a build in this process or in several worker processes of this machine.

All engines, that of `ray_engine` too, record parts of the shards and skip committed shards. A part
can therefore be interrupted at any time and run again without harm.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from cache_service.format.group import ROOT_KEY
from cache_service.interrupts import stop_on_signal
from cache_service.recording.comparison import check_teacher
from cache_service.recording.context import BuildContext, resolve_device
from cache_service.recording.pool import RecordingWorker
from cache_service.recording.record import open_writer, record
from cache_service.recording.shards import WHOLE, OnProgress, Part, Progress
from cache_service.storage import open_storage
from cache_service.teacher.score import require_trained

POLL_S = 0.2
"""Interval between checks of the worker processes, seconds."""


def prepare(build: BuildContext, *, on_message: Callable[[str], None] = lambda _: None) -> None:
    """Check the teacher with a few batches, then create or extend the cache.

    If rows are left to record, the teacher must be repeatable, and its logits for recorded views
    must equal the recorded ones. For a new cache, its accuracy must also be above chance.

    Raises:
        UnsupportedError: the teacher returns different logits for the same views.
        UntrainedTeacherError: the accuracy of the teacher is that of guessing.
        SpecMismatchError: the path holds a cache with another spec or of another teacher.
    """
    on_message(f"teacher: {build.config.teacher.model}, {build.teacher.weights_from}")
    for note in build.notes:
        on_message(note)
    if build.dataset.left_out:
        on_message(f"dataset: not taken: {build.dataset.left_out}")
    check_teacher(build)
    if open_storage(build.config.cache).get(ROOT_KEY) is None:
        score = build.score()
        on_message(
            f"teacher: {score.accuracy:.1%} of {score.num_samples} samples right "
            f"(chance {score.chance:.1%})"
        )
        other = score.other_normalization
        if other is not None:
            on_message(
                f"teacher: {other.right_now} of {other.num_views} samples right, "
                f"{other.description} ({other.hint})"
            )
        require_trained(score, build.config.teacher)
    open_writer(build)


def run_local(
    build: BuildContext,
    *,
    seeds: tuple[int, ...],
    part: Part = WHOLE,
    on_progress: OnProgress = lambda _: None,
) -> int:
    """Record a part with `config.processes` processes and return the number of committed shards.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM was received. Committed shards stay valid.
        KdCacheError: the error that stopped a worker.
    """
    config = build.config
    if config.processes == 1:
        return record(build, open_writer(build), seeds=seeds, part=part, on_progress=on_progress)
    device = resolve_device(config.device)
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    workers = [
        RecordingWorker(
            config.model_copy(update={"device": f"cuda:{number % gpus}" if gpus else device}),
            seeds,
            each,
        )
        for number, each in enumerate(part.split(config.processes))
    ]
    try:
        with stop_on_signal() as stop:
            while not all(worker.is_done for worker in workers):
                if stop.requested:
                    raise KeyboardInterrupt
                time.sleep(POLL_S)
                for worker in workers:
                    worker.check()
                on_progress(Progress.sum([w.progress for w in workers if w.progress]))
    finally:
        # Signal all workers first, so that they finish their shards at the same time.
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.stop()
        open_storage(config.cache).sweep()
    return sum(worker.committed for worker in workers)
