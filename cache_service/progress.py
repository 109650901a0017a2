"""Progress on standard error: bars on a terminal, JSON lines anywhere else."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class ProgressDisplay:
    """Shows how far some work is. Use it as a context manager.

    Attributes:
        is_terminal: whether the stream is a terminal, which gets bars and not events.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self.is_terminal = self._stream.isatty()
        self._bars = Progress(
            TextColumn("{task.fields[title]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[details]}"),
            console=Console(file=self._stream),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_terminal:
            self._bars.stop()

    def show_message(self, text: str) -> None:
        """Show one line of text."""
        if self.is_terminal:
            self._bars.console.print(text, highlight=False)
        else:
            self.write_event({"event": "note", "text": text})

    def update_bar(
        self,
        name: str = "",
        *,
        title: str,
        completed: int,
        total: int | None = None,
        details: str = "",
    ) -> None:
        """Make the bar of this name, or move it. `total` may be given once and then left out."""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task("", total=None, title=title, details=details)
        self._bars.update(
            self._tasks[name], completed=completed, total=total, title=title, details=details
        )

    def write_event(self, event: Mapping[str, Any]) -> None:
        """Write one event as a line of JSON."""
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()
