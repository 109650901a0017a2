"""The demo's table, and the sentences under it."""

from __future__ import annotations

from rich.table import Table

from cache_service.human_format import human_bytes, human_seconds
from cli.experiments.demo.result import DemoResult
from cli.experiments.demo.settings import CACHED_KD, LIVE

COLUMNS = ("Student", "Test accuracy", "Per step", "Peak memory")


def cells(result: DemoResult) -> list[tuple[str, str, str, str]]:
    """The table's rows as text."""
    return [
        (
            row.way.title,
            f"{row.measured.accuracy:.1%}",
            milliseconds(row.measured.seconds_per_step),
            human_bytes(row.measured.peak_memory_bytes),
        )
        for row in result.rows
    ]


def make_table(result: DemoResult) -> Table:
    """For a terminal."""
    table = Table()
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == COLUMNS[0] else "right", no_wrap=True)
    for row in cells(result):
        table.add_row(*row)
    return table


def caption(result: DemoResult) -> str:
    """What the table is of."""
    return (
        f"One student, {result.settings.epochs} epochs on the same views, four ways "
        f"(its teacher: {result.teacher.accuracy:.1%})"
    )


def summary(result: DemoResult, report: str) -> list[str]:
    """What the numbers come to."""
    return [costs(result), same_losses(result), f"Report: {report}"]


def costs(result: DemoResult) -> str:
    """What the live teacher cost, and what recording it cost."""
    live, cached = result.measured(LIVE), result.measured(CACHED_KD)
    slower = live.seconds_per_step / cached.seconds_per_step
    larger = live.peak_memory_bytes / max(cached.peak_memory_bytes, 1)
    text = (
        f"With the live teacher a step took {slower:.1f} times as long and {larger:.1f} times the "
        "memory of one from the cache."
    )
    seconds = result.recording.seconds
    if seconds is None:
        return text
    steps = len(result.live_losses)
    saved = (live.seconds_per_step - cached.seconds_per_step) * steps
    recorded = f"{text} Recording took {human_seconds(seconds)}, once"
    if saved <= 0:
        return f"{recorded}."
    return f"{recorded}; from it, a run like these is {human_seconds(saved)} shorter."


def same_losses(result: DemoResult) -> str:
    """How far live and cached training are apart."""
    found = result.agreement
    verdict = "within" if found.holds else "NOT within"
    return (
        f"From the same weights, the loss with the live teacher and the loss from the cache differ "
        f"by at most {found.max_abs_difference:.2g} nats at {len(found.live)} steps, {verdict} the "
        f"{found.tolerance:g} that rounding to float16 allows."
    )


def milliseconds(seconds: float) -> str:
    """`0.0213` -> `21.3 ms`."""
    return f"{seconds * 1000:.1f} ms"
