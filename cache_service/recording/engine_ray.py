"""The Ray engine: one task per part, wherever the cluster has room.

Ray runs a task at least once. That is enough: a part that is run twice finds its shards committed.
"""

from __future__ import annotations

from typing import Any

from cache_service.errors import ConfigError
from cache_service.recording.checks import check_teacher
from cache_service.recording.config import BuildConfig
from cache_service.recording.jobs import WHOLE, Part
from cache_service.recording.opened import OpenedBuild, open_build, resolve_device
from cache_service.recording.progress import OnProgress
from cache_service.recording.record import open_writer, record

MAX_RETRIES = 3
"""Times that Ray starts a part again after a lost worker."""


def run_ray(
    build: OpenedBuild,
    *,
    seeds: tuple[int, ...],
    part: Part = WHOLE,
    on_progress: OnProgress = lambda _: None,
) -> int:
    """Record a part as `config.processes` Ray tasks. Returns the shards committed.

    The cache must lie where every node reaches it. `on_progress` is not called: tasks report to
    Ray's own log.

    Raises:
        ConfigError: Ray is not installed.
        KdCacheError: whatever stopped a task.
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
    count = build.config.processes
    gpus = 1 if resolve_device(build.config.device).startswith("cuda") else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=MAX_RETRIES)(_build_part)
    try:
        parts = [Part(part.index + part.count * i, part.count * count) for i in range(count)]
        answers: list[Any] = [task.remote(build.config, seeds, each) for each in parts]
        return sum(ray.get(answers))
    except ray.exceptions.RayTaskError as problem:
        raise problem.cause from problem
    finally:
        if started_here:
            ray.shutdown()


def _build_part(config: BuildConfig, seeds: tuple[int, ...], part: Part) -> int:
    build = open_build(config.model_copy(update={"processes": 1}))
    check_teacher(build)  # another machine may have another file of the same name
    return record(build, open_writer(build), seeds=seeds, part=part)
