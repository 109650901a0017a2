"""A build's progress: a bar on a terminal, JSON lines otherwise. Always on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cache_service.human_format import human_bytes

if TYPE_CHECKING:
    from cache_service.recording.progress import Progress as BuildProgress


class Listener(Protocol):
    """Who is told how far a build is."""

    def say(self, line: str) -> None:
        """One line for people."""

    def update(self, progress: BuildProgress) -> None:
        """The state after a shard."""


@contextmanager
def build_progress() -> Iterator[Listener]:
    """A bar where stderr is a terminal, else one JSON line per shard."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _JsonLines()
        return
    columns = (
        TextColumn("seed {task.fields[seed]}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} views"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TextColumn("{task.fields[written]}"),
        TextColumn("{task.fields[shards]} shards"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield _Bar(bar)


class _JsonLines:
    def __init__(self) -> None:
        self._shards_done = 0

    def say(self, line: str) -> None:
        self._write({"event": "note", "text": line})

    def update(self, progress: BuildProgress) -> None:
        if progress.shards_done != self._shards_done:
            self._shards_done = progress.shards_done
            self._write({"event": "shard", **asdict(progress), "eta_s": progress.eta_s})

    def _write(self, event: dict[str, object]) -> None:
        sys.stderr.write(json.dumps(event) + "\n")
        sys.stderr.flush()


class _Bar:
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=1, seed="-", rate=0.0, written="0 B", shards="0")

    def say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False)

    def update(self, progress: BuildProgress) -> None:
        self._bar.update(
            self._task,
            completed=progress.rows_done,
            total=progress.rows_total,
            seed=progress.seed,
            rate=progress.rows_per_s,
            written=human_bytes(progress.bytes_written),
            shards=f"{progress.shards_done}/{progress.shards_total}",
        )
