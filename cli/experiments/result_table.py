"""What an experiment ends with: measured figures beside published ones, as Markdown and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from cache_service.config import Frozen, dump_yaml
from cache_service.human_format import human_seconds
from cli.experiments.experiment_file import Figure, FigureKind

NOTHING = "-"

FIGURES: dict[FigureKind, str] = {
    "errors": "numbers of test errors",
    "accuracy": "percentages of the test set classified correctly",
    "error rate": "percentages of the test set classified wrongly",
}

OUTCOMES = {True: "met", False: "**not met**", None: "**not measured**"}


class Measured(Frozen):
    """One run's figure, or why there is none.

    Attributes:
        seed: of the run.
        last: after the last epoch.
        best: of the best epoch. That epoch is chosen on the test set, so the figure flatters. None
            where a figure belongs to the last epoch alone.
        best_epoch: epochs completed when it was reached.
        epochs: length of the run.
        seconds: spent in these epochs, over all starts of the run; None where several students
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
    """One quantity: the published figure, or the range of several, and the measured ones."""

    what: str
    published: Figure | tuple[Figure, Figure] | None
    runs: tuple[Measured, ...]

    @property
    def values(self) -> tuple[Figure, ...]:
        """Figures of the runs that did not fail."""
        return tuple(run.last for run in self.runs if run.last is not None)

    @property
    def mean(self) -> float | None:
        """Mean over the runs that did not fail."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def standard_deviation(self) -> float | None:
        """Sample standard deviation over the runs; None of fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def failures(self) -> tuple[str, ...]:
        """What stopped the runs that failed."""
        return tuple(run.failure for run in self.runs if run.failure is not None)


class Goal(Frozen):
    """A statement that the experiment was to support.

    Attributes:
        text: the statement, with its bound.
        measured: what was measured, in words.
        met: None where a failed run left nothing to compare.
    """

    text: str
    measured: str
    met: bool | None


class Table(Frozen):
    """The result of an experiment.

    Attributes:
        name: of the experiment.
        title: of the page.
        source: where the published figures were published.
        quick: whether this is the short form.
        command: what makes this table again.
        rows, goals: the figures.
        unit: of the figures.
        notes: what a reader must know to read them correctly.
        settings: everything that decides the figures.
        machine, versions: where and with what they were measured.
        seconds: time by part; parts of several runs are summed.
    """

    name: str
    title: str
    source: str | None
    quick: bool
    command: str
    rows: tuple[Row, ...]
    goals: tuple[Goal, ...] = ()
    notes: tuple[str, ...] = ()
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float]
    unit: FigureKind = "errors"

    def document(self) -> dict[str, Any]:
        """The table as JSON. `spread` is the older name of `standard_deviation`."""
        rows = [
            row.model_dump(mode="json")
            | {
                "mean": row.mean,
                "standard_deviation": row.standard_deviation,
                "spread": row.standard_deviation,
            }
            for row in self.rows
        ]
        return self.model_dump(mode="json") | {"rows": rows}


def render_markdown(table: Table) -> str:
    """The table as a Markdown page."""
    return "\n".join(_page_lines(table)) + "\n"


def _page_lines(table: Table) -> Iterator[str]:
    yield from (f"# {table.title}", "")
    if table.source is not None:
        yield from (f"Source: {table.source}", "")
    if table.quick:
        yield "Quick form: fewer epochs and seeds, so these figures are not the full form's."
        yield ""
    yield from (f"Made by `{table.command}`.", "")
    yield from grid(*figure_cells(table))
    yield from ("", describe_figures(table))
    if table.goals:
        yield ""
        goals = [(goal.text, goal.measured, OUTCOMES[goal.met]) for goal in table.goals]
        yield from grid(("wanted", "measured", ""), goals)
    for note in table.notes:
        yield from ("", note)
    yield from _yaml_section("Settings", table.settings)
    yield from _yaml_section("Machine", table.machine)
    yield from _yaml_section("Versions", table.versions)
    yield from ("", "## Time", "")
    yield from grid(("", "time"), time_cells(table))


def describe_figures(table: Table) -> str:
    """What the figures of a table are."""
    return (
        f"Figures are {FIGURES[table.unit]}; measured ones are mean and standard deviation over "
        "seeds. The best epoch is chosen on the test set, so it flatters: compare the last."
    )


def figure_cells(table: Table) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the main table as text, without columns that hold nothing."""
    header = ("", "published", "measured, last epoch", "each run", "best epoch", "time per run")
    rows = [
        (
            row.what,
            _published(row, table.unit),
            show_mean(row, table.unit),
            "; ".join(_run(run, table.unit) for run in row.runs) or NOTHING,
            "; ".join(_best(run, table.unit) for run in row.runs if run.best is not None)
            or NOTHING,
            _time(row),
        )
        for row in table.rows
    ]
    used = [index for index in range(len(header)) if any(row[index] != NOTHING for row in rows)]
    return (
        tuple(header[index] for index in used),
        [tuple(row[index] for index in used) for row in rows],
    )


def time_cells(table: Table) -> list[tuple[str, str]]:
    """Rows of the table of times as text."""
    parts = [*table.seconds.items(), ("together", sum(table.seconds.values()))]
    return [(name, human_seconds(value)) for name, value in parts]


def show_figure(value: Figure | None, unit: FigureKind) -> str:
    """A figure as it is written in a table."""
    return f"{value}" if unit == "errors" else f"{value:.2f}"


def show_mean(row: Row, unit: FigureKind) -> str:
    """Mean and standard deviation of a row, with the number of runs that failed."""
    if row.mean is None:
        return "**failed**"
    digits = 2 if unit != "errors" else int(len(row.values) > 1)
    text = f"{row.mean:.{digits}f}"
    if row.standard_deviation is not None:
        text += f" +- {row.standard_deviation:.{digits}f}"
    return f"{text} (**{len(row.failures)} failed**)" if row.failures else text


def _published(row: Row, unit: FigureKind) -> str:
    if row.published is None:
        return NOTHING
    if isinstance(row.published, tuple):
        return " to ".join(show_figure(end, unit) for end in row.published)
    return show_figure(row.published, unit)


def _run(run: Measured, unit: FigureKind) -> str:
    result = f"failed: {run.failure}" if run.failure is not None else show_figure(run.last, unit)
    return f"seed {run.seed}: {result}"


def _best(run: Measured, unit: FigureKind) -> str:
    return f"{show_figure(run.best, unit)} at {run.best_epoch} of {run.epochs}"


def _time(row: Row) -> str:
    known = [run.seconds for run in row.runs if run.seconds is not None]
    return human_seconds(sum(known) / len(known)) if known else NOTHING


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    for cells in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _yaml_section(title: str, values: dict[str, Any]) -> Iterator[str]:
    yield from ("", f"## {title}", "", "```yaml")
    yield from (dump_yaml(values, width=1000).rstrip(), "```")
