"""Metrics on disk: `metrics.jsonl` as they come, `metrics.csv` with one row per epoch.

A run that resumes first drops what was written after its checkpoint, so the files of a run that
was killed ten times hold each step once, like those of a run that was not.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cache_service.errors import OutOfSpaceError
from cache_service.storage.local import LocalStorage
from distill.events import Event, Listener, Value

LINES_NAME = "metrics.jsonl"
TABLE_NAME = "metrics.csv"

RECORDED = {"start", "step", "evaluation", "epoch"}


@contextmanager
def metrics_files(
    out: str, *, step: int, trackers: Sequence[AbstractContextManager[Listener]] = ()
) -> Iterator[Listener]:
    """A listener that writes to the folder `out`, as the continuation of a run at `step`.

    Args:
        out: the folder.
        step: lines of later steps are dropped.
        trackers: told the same.

    Raises:
        ConfigError: a tracker was asked for that cannot be had.
        OutOfSpaceError, StorageError: the folder cannot be written.
    """
    writers: list[Listener] = []
    with ExitStack() as stack:
        writers.extend(stack.enter_context(tracker) for tracker in trackers)
        kept = _drop_after(out, step)
        writers.append(_EpochTable(out, [line for line in kept if line["kind"] == "epoch"]))
        writers.append(stack.enter_context(_lines(out)))

        def write(event: Event) -> None:
            if event.kind in RECORDED:
                for writer in writers:
                    writer(event)

        yield write


def read_metrics(out: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that a kill cut short is left out."""
    content = LocalStorage(out).get(LINES_NAME) or b""
    lines = []
    for line in content.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _drop_after(out: str, step: int) -> list[dict[str, Any]]:
    lines = read_metrics(out) if step else []
    kept = [line for line in lines if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    storage = LocalStorage(out)
    storage.put(LINES_NAME, text.encode())
    storage.sweep()
    return kept


@contextmanager
def _lines(out: str) -> Iterator[Listener]:
    path = Path(out) / LINES_NAME
    with path.open("a", encoding="utf-8") as file:

        def write(event: Event) -> None:
            try:
                file.write(json.dumps(finite(event.document())) + "\n")
                file.flush()
            except OSError as problem:
                raise OutOfSpaceError(f"cannot write {path}: {problem.strerror}.") from problem

        yield write


class _EpochTable:
    """One row per epoch, written whole each time: the columns of any epoch are in the header."""

    def __init__(self, out: str, rows: list[dict[str, Value]]) -> None:
        self._storage = LocalStorage(out)
        self._rows = [{k: v for k, v in row.items() if k != "kind"} for row in rows]

    def __call__(self, event: Event) -> None:
        if event.kind != "epoch":
            return
        self._rows.append({"epoch": event.epoch, "step": event.step, **event.values})
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        self._storage.put(TABLE_NAME, text.getvalue().encode())
        self._storage.sweep()


def finite(document: dict[str, Value]) -> dict[str, Value]:
    """The document with null for what JSON has no number for."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in document.items()
    }
