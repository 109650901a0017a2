"""Shows how a training run is going, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from cache_service.progress import ProgressDisplay
from distill.reporting import Event, Listener, finite

SHOWN = ("loss", "top1", "eval_top1", "lr")
"""Values beside the bar: what one watches a run for. The rest is in the metrics files."""


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[Listener]:
    """A listener for `train`: a bar for each student on a terminal, else a JSON line per event."""
    latest: dict[str, dict[str, str]] = {}

    def listen(event: Event) -> None:
        if not display.is_terminal:
            display.write_event(finite(event.document()))
            return
        values = latest.setdefault(event.student, {})
        for name in SHOWN:
            value = event.values.get(name)
            if isinstance(value, int | float):
                values[name] = f"{name} {value:.4g}"
        title = f"{event.student}: " if event.student else ""
        total = event.values.get("num_steps")
        display.update_bar(
            event.student,
            title=f"{title}epoch {event.epoch}",
            completed=event.step,
            total=total if isinstance(total, int) else None,
            details="  ".join(values[name] for name in SHOWN if name in values),
        )

    with ProgressDisplay(stream) as display:
        yield listen
