"""Progress on standard error: a bar on a terminal, JSON lines anywhere else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from distill.events import Event, Listener
from distill.metrics import finite

SHOWN = ("loss", "top1", "eval_top1", "lr")
"""Values beside the bar: what one watches a run for. The rest is in the metrics files."""


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[Listener]:
    """A listener for `train` that shows how the run is going."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield lambda event: _write_line(stream, event)
        return
    columns = (
        TextColumn("{task.fields[where]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Progress(*columns, console=Console(file=stream)) as progress:
        yield _Bar(progress)


def _write_line(stream: TextIO, event: Event) -> None:
    stream.write(json.dumps(finite(event.document())) + "\n")
    stream.flush()


class _Bar:
    """One line for each student."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._values: dict[str, dict[str, str]] = {}

    def __call__(self, event: Event) -> None:
        values = self._values.setdefault(event.student, {})
        for name in SHOWN:
            value = event.values.get(name)
            if isinstance(value, int | float):
                values[name] = f"{name} {value:.4g}"
        whose = f"{event.student}: " if event.student else ""
        shown: dict[str, Any] = {
            "where": f"{whose}epoch {event.epoch}",
            "values": "  ".join(values[name] for name in SHOWN if name in values),
        }
        if event.student not in self._tasks:
            total = event.values.get("num_steps")
            self._tasks[event.student] = self._progress.add_task(
                "", total=total if isinstance(total, int) else None, **shown
            )
        self._progress.update(self._tasks[event.student], completed=event.step, **shown)
