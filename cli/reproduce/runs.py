"""Training and recording for a reproduction, with the project's own trainer and recorder.

Everything resumes: a finished run costs the opening of its checkpoint, and no epoch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cache_service.build.config import BuildConfig
from cache_service.build.engine import prepare, run_local
from cache_service.build.opened import open_build
from cache_service.configfile import validate_config
from cache_service.errors import NonFiniteError
from cache_service.storage.local import LocalStorage
from cli.reproduce.order import Say
from cli.reproduce.table import Measured
from distill.config import TrainConfig
from distill.events import Event
from distill.metrics import read_metrics
from distill.scores import Evaluation
from distill.train import train

SECONDS_NAME = "recording-seconds.txt"


def train_run(document: dict[str, Any], *, title: str, say: Say) -> Measured:
    """Train as a train file says, or take the run that is there. A diverged run is a failure.

    Raises:
        KdCacheError: the run cannot start; whatever stops it later is in the result.
        KeyboardInterrupt: stopped; the same call goes on from there.
    """
    config = validate_config(TrainConfig, document, where=title)
    epochs_before = _epochs(config.out)

    def listen(event: Event) -> None:
        if event.kind == "epoch":
            wrong = 1 - float(event.values["eval_top1"] or 0)
            say(f"{title}: epoch {event.epoch} of {config.epochs}, {wrong:.2%} of test wrong")

    try:
        history = train(config, on_event=listen).history
    except NonFiniteError as failure:
        say(f"{title}: failed: {failure}")
        return Measured(seed=config.seed, failure=failure.message)
    if epochs_before == config.epochs:
        say(f"{title}: finished before")
    assert history.last is not None
    assert history.best is not None
    return Measured(
        seed=config.seed,
        last=count_wrong(history.last),
        best=count_wrong(history.best),
        best_epoch=history.best_epoch,
        epochs=config.epochs,
        seconds=_seconds(config.out),
    )


def record_teacher(document: dict[str, Any], *, title: str, say: Say) -> float:
    """Record what is not recorded yet. Returns the seconds that all of it took.

    Raises:
        UntrainedTeacherError, SpecMismatchError, KdCacheError: see the message.
    """
    config = validate_config(BuildConfig, document, where=title)
    storage = LocalStorage(str(Path(config.cache).parent))
    started = time.perf_counter()
    opened = open_build(config)
    prepare(opened, say=lambda line: say(f"{title}: {line}"))
    committed = run_local(opened, seeds=config.seeds)
    seconds = float(storage.get(SECONDS_NAME) or 0)
    if committed:
        seconds += time.perf_counter() - started
        storage.put(SECONDS_NAME, f"{seconds:.3f}\n".encode())
        storage.sweep()
        say(f"{title}: recorded {len(config.seeds)} epochs of {len(opened.dataset)} views")
    else:
        say(f"{title}: recorded before")
    return seconds


def count_wrong(evaluation: Evaluation) -> int:
    """Top-1 errors."""
    return round((1 - evaluation.top1) * evaluation.num_samples)


def _epochs(out: str) -> int:
    return sum(line["kind"] == "epoch" for line in read_metrics(out))


def _seconds(out: str) -> float:
    return float(sum(line["epoch_s"] for line in read_metrics(out) if line["kind"] == "epoch"))


def total_seconds(runs: Iterable[Measured]) -> float:
    """Seconds that these runs took together."""
    return sum(run.seconds or 0.0 for run in runs)
