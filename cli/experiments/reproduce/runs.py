"""Recording for a reproduction, with the project's own recorder: what is there is kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cache_service.configfile import validate_config
from cache_service.recording.config import BuildConfig
from cache_service.recording.engine import prepare, run_local
from cache_service.recording.opened import open_build
from cache_service.storage.local import LocalStorage
from cli.experiments.reproduce.order import Say
from distill.scores import Evaluation

SECONDS_SUFFIX = "-seconds.txt"
"""Of the file beside a cache that holds what its recording took, over all starts."""


def record_teacher(document: dict[str, Any], *, title: str, say: Say) -> float:
    """Record what is not recorded yet. Returns the seconds that all of it took.

    Raises:
        UntrainedTeacherError, SpecMismatchError, KdCacheError: see the message.
    """
    config = validate_config(BuildConfig, document, where=title)
    folder, name = Path(config.cache).parent, Path(config.cache).name + SECONDS_SUFFIX
    storage = LocalStorage(str(folder))
    started = time.perf_counter()
    opened = open_build(config)
    prepare(opened, say=lambda line: say(f"{title}: {line}"))
    committed = run_local(opened, seeds=config.seeds)
    seconds = float(storage.get(name) or 0)
    if committed:
        seconds += time.perf_counter() - started
        storage.put(name, f"{seconds:.3f}\n".encode())
        storage.sweep()
        say(f"{title}: recorded {len(config.seeds)} epochs of {len(opened.dataset)} views")
    else:
        say(f"{title}: recorded before")
    return seconds


def count_wrong(evaluation: Evaluation) -> int:
    """Top-1 errors."""
    return round((1 - evaluation.top1) * evaluation.num_samples)
