"""Runs a build in this process, in several worker processes, or as Ray tasks.

All engines record parts of the shards with `record`, which skips committed shards. A part can
therefore be interrupted at any time and run again without harm.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from cache_service.errors import ConfigError
from cache_service.format.group import ROOT_KEY
from cache_service.interrupts import stop_on_signal
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.comparison import check_teacher
from cache_service.recording.context import BuildContext, open_build, resolve_device
from cache_service.recording.pool import RecordingWorker
from cache_service.recording.record import open_writer, record
from cache_service.recording.shards import WHOLE, OnProgress, Part, Progress
from cache_service.storage import open_storage
from cache_service.teacher.score import require_trained

POLL_S = 0.2
"""Interval between checks of the worker processes, seconds."""

MAX_RETRIES = 3
"""Number of times that Ray restarts a task after its worker is lost."""


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
    if build.dataset.left_out:
        on_message(f"dataset: not taken: {build.dataset.left_out}")
    check_teacher(build)
    if open_storage(build.config.cache).get(ROOT_KEY) is None:
        score = build.score()
        on_message(
            f"teacher: {score.accuracy:.1%} of {score.num_samples} samples right "
            f"(chance {score.chance:.1%})"
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


def run_ray(
    build: BuildContext,
    *,
    seeds: tuple[int, ...],
    part: Part = WHOLE,
    on_progress: OnProgress = lambda _: None,
) -> int:
    """Record a part as `config.processes` Ray tasks and return the number of committed shards.

    Every node must be able to access the cache. `on_progress` is not called; tasks write to the log
    of Ray.

    Raises:
        ConfigError: Ray is not installed.
        KdCacheError: the error that stopped a task.
    """
    del on_progress
    try:
        import ray
    except ImportError as missing:
        raise ConfigError(
            "--engine ray: Ray is not installed.", hint="pip install 'kd-cache[ray]'"
        ) from missing
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(include_dashboard=False, log_to_driver=False)
    gpus = 1 if resolve_device(build.config.device).startswith("cuda") else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=MAX_RETRIES)(_record_part)
    try:
        results: list[Any] = [
            task.remote(build.config, seeds, each) for each in part.split(build.config.processes)
        ]
        return sum(ray.get(results))
    except ray.exceptions.RayTaskError as problem:
        raise problem.cause from problem
    finally:
        if started_here:
            ray.shutdown()


def _record_part(config: BuildConfig, seeds: tuple[int, ...], part: Part) -> int:
    build = open_build(config.model_copy(update={"processes": 1}))
    check_teacher(build)  # another machine may have a different checkpoint at the same path
    return record(build, open_writer(build), seeds=seeds, part=part)
