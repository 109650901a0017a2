"""The demo from start to end: train, record, train four ways, compare, report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Protocol

import torch

from cache_service.datasets import DatasetConfig
from cache_service.storage.local import LocalStorage
from cli.experiments.demo.agreement import compare_steps
from cli.experiments.demo.children import Children
from cli.experiments.demo.files import BUILD, TRAIN_SPLIT, documents, write_files
from cli.experiments.demo.page import render_page
from cli.experiments.demo.record import look_at_one, record
from cli.experiments.demo.result import DemoResult
from cli.experiments.demo.runs import (
    Measure,
    Planned,
    Say,
    loss_curve,
    num_parameters,
    plan_ways,
    train_teacher,
    train_ways,
)
from cli.experiments.demo.settings import CACHED_KD, LIVE, DemoSettings
from cli.experiments.demo.way import WayJob

REPORT_NAME = "report.html"


class Workers(Protocol):
    """Whoever trains and measures, one way at a time."""

    @property
    def measure(self) -> Measure:
        """Train one way."""
        ...


def run_demo(
    out: str,
    *,
    settings: DemoSettings | None = None,
    say: Say = lambda _: None,
    workers: AbstractContextManager[Workers] | None = None,
) -> DemoResult:
    """Do everything and write the report. What an earlier run into `out` has finished is kept.

    Args:
        out: folder for everything.
        settings: sizes and lengths.
        say: told what is going on, in sentences.
        workers: who trains the student; by default each way has a process of its own.

    Raises:
        ConfigError, SpecMismatchError: `out` holds a demo of other settings.
        KeyboardInterrupt: stopped; the same call goes on from there.
    """
    settings = settings or DemoSettings()
    torch.set_num_threads(settings.threads)
    planned = documents(settings, out)
    ways = plan_ways(planned, settings)
    missing = sum(each.kept is None for each in ways)
    with ExitStack() as stack:
        ready = stack.enter_context(workers or Children(missing, threads=settings.threads))
        say(f"1 of 4: training the teacher, {settings.teacher_model}, on labels.")
        teacher = train_teacher(planned, say)
        texts = write_files(settings, out)  # not before: a folder of other settings is refused
        say("2 of 4: recording what it says about every view.")
        recording = record(out, planned[BUILD], say)
        say(f"3 of 4: training one student {len(ways)} ways on these views.")
        rows = tuple(train_ways(ways, ready.measure, say))
    say("4 of 4: comparing losses, and writing the report.")
    live, cached = _jobs_to_compare(ways)
    result = DemoResult(
        out=out,
        settings=settings,
        rows=rows,
        agreement=compare_steps(cached.train, live),
        live_losses=loss_curve(live.train.out),
        cached_losses=loss_curve(cached.train.out),
        teacher=teacher,
        student_parameters=num_parameters(cached.train.out),
        recording=recording,
        sample=look_at_one(recording.url, DatasetConfig.model_validate(TRAIN_SPLIT)),
        files=texts,
    )
    _write_report(result)
    return result


def _jobs_to_compare(ways: Sequence[Planned]) -> tuple[WayJob, WayJob]:
    """KD with the live teacher, and KD from the cache."""
    jobs = {each.way: each.job for each in ways}
    return jobs[LIVE], jobs[CACHED_KD]


def _write_report(result: DemoResult) -> None:
    storage = LocalStorage(result.out)
    storage.put(REPORT_NAME, render_page(result).encode())
    storage.sweep()


def report_path(out: str) -> str:
    """Where the report is."""
    return str(Path(out) / REPORT_NAME)
