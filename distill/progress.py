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
        TextColumn("epoch {task.fields[epoch]}"),
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
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None
        self._values: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        for name in SHOWN:
            value = event.values.get(name)
            if isinstance(value, int | float):
                self._values[name] = f"{name} {value:.4g}"
        texts = [self._values[name] for name in SHOWN if name in self._values]
        shown: dict[str, Any] = {"epoch": event.epoch, "values": "  ".join(texts)}
        if self._task is None:
            total = event.values.get("num_steps")
            self._task = self._progress.add_task(
                "", total=total if isinstance(total, int) else None, **shown
            )
        self._progress.update(self._task, completed=event.step, **shown)
