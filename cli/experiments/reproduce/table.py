"""What a reproduction ends with: published figures beside measured ones, and where from."""

from __future__ import annotations

import statistics
from typing import Any, Literal

from cache_service.format.frozen import Frozen

Figure = int | float
"""A count of test errors, or a share of the test set in percent."""

Unit = Literal["errors", "accuracy", "error rate"]
"""What the figures of a table are; shares are in percent."""


class Measured(Frozen):
    """One run's figure, or why there is none.

    Attributes:
        seed: of the run.
        last: after the last epoch.
        best: of the epoch that was best; chosen on the test set, so it flatters. None where a
            figure belongs to the last epoch alone.
        best_epoch: epochs completed when it was reached.
        epochs: length of the run.
        seconds: spent in these epochs, over all starts of the run. None where several students
            shared them.
        failure: what stopped the run.
    """

    seed: int
    last: Figure | None = None
    best: Figure | None = None
    best_epoch: int | None = None
    epochs: int | None = None
    seconds: float | None = None
    failure: str | None = None


class Row(Frozen):
    """One quantity: the published figure, or the range of several, and ours."""

    what: str
    published: Figure | tuple[Figure, Figure] | None
    runs: tuple[Measured, ...]

    @property
    def values(self) -> tuple[Figure, ...]:
        """Of the runs that did not fail."""
        return tuple(run.last for run in self.runs if run.last is not None)

    @property
    def mean(self) -> float | None:
        """Over the runs that did not fail."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over runs; None of fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def failures(self) -> tuple[str, ...]:
        """What stopped the runs that failed."""
        return tuple(run.failure for run in self.runs if run.failure is not None)


class Goal(Frozen):
    """What the reproduction was to show.

    Attributes:
        text: in words, with the bound.
        measured: in words.
        met: None where a failure left nothing to judge.
    """

    text: str
    measured: str
    met: bool | None


class Table(Frozen):
    """A reproduction's result.

    Attributes:
        name: of the reproduction.
        title: of the page.
        source: paper and table.
        quick: whether this is the short form.
        command: what makes this table again.
        rows, goals: the figures.
        unit: of the figures.
        notes: what a reader must know to read them right.
        settings: everything that was chosen.
        machine, versions: where and with what.
        seconds: by part; parts that several runs make up are summed.
    """

    name: str
    title: str
    source: str
    quick: bool
    command: str
    rows: tuple[Row, ...]
    goals: tuple[Goal, ...]
    notes: tuple[str, ...]
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float]
    unit: Unit = "errors"

    def document(self) -> dict[str, Any]:
        """The table as JSON, with means and spreads worked out."""
        rows = [
            row.model_dump(mode="json") | {"mean": row.mean, "spread": row.spread}
            for row in self.rows
        ]
        return self.model_dump(mode="json") | {"rows": rows}
