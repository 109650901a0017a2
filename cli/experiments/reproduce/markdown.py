"""A reproduction's table as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from cache_service.wording import human_seconds
from cli.experiments.reproduce.table import Figure, Goal, Measured, Row, Table, Unit

NOTHING = "-"

UNITS: dict[Unit, str] = {
    "errors": "numbers of test errors",
    "accuracy": "shares of the test set classified right, in %",
    "error rate": "shares of the test set classified wrong, in %",
}

VERDICTS = {True: "met", False: "**not met**", None: "**not measured**"}


def render_markdown(table: Table) -> str:
    """The whole page."""
    return "\n".join(_lines(table)) + "\n"


def _lines(table: Table) -> Iterator[str]:
    yield f"# {table.title}"
    yield ""
    yield f"Source: {table.source}"
    yield ""
    if table.quick:
        yield "Quick form: fewer epochs and seeds, so these figures are not the reproduction's."
        yield ""
    yield f"Made by `{table.command}`."
    yield ""
    header = ("", "published", "measured, last epoch", "each run", "best epoch", "time per run")
    yield from grid(header, [_row(row, table.unit) for row in table.rows])
    yield ""
    yield (
        f"Figures are {UNITS[table.unit]}; measured ones are mean and standard deviation over "
        "seeds. The best epoch is chosen on the test set, so it flatters: compare the last."
    )
    yield ""
    yield from grid(("wanted", "measured", ""), [_goal(goal) for goal in table.goals])
    for note in table.notes:
        yield ""
        yield note
    yield from _block("Settings", table.settings)
    yield from _block("Machine", table.machine)
    yield from _block("Versions", table.versions)
    yield ""
    yield "## Time"
    yield ""
    parts = [*table.seconds.items(), ("together", sum(table.seconds.values()))]
    yield from grid(("", "time"), [(name, human_seconds(value)) for name, value in parts])


def _row(row: Row, unit: Unit) -> tuple[str, ...]:
    return (
        row.what,
        _published(row, unit),
        _mean(row, unit),
        "; ".join(_run(run, unit) for run in row.runs) or NOTHING,
        "; ".join(_best(run, unit) for run in row.runs if run.best is not None) or NOTHING,
        _time(row),
    )


def _figure(value: Figure | None, unit: Unit) -> str:
    return f"{value}" if unit == "errors" else f"{value:.2f}"


def _published(row: Row, unit: Unit) -> str:
    if row.published is None:
        return NOTHING
    if isinstance(row.published, tuple):
        return " to ".join(_figure(end, unit) for end in row.published)
    return _figure(row.published, unit)


def _mean(row: Row, unit: Unit) -> str:
    if row.mean is None:
        return "**failed**"
    digits = 2 if unit != "errors" else int(len(row.values) > 1)
    text = f"{row.mean:.{digits}f}"
    if row.spread is not None:
        text += f" +- {row.spread:.{digits}f}"
    return f"{text} (**{len(row.failures)} failed**)" if row.failures else text


def _run(run: Measured, unit: Unit) -> str:
    told = f"failed: {run.failure}" if run.failure is not None else _figure(run.last, unit)
    return f"seed {run.seed}: {told}"


def _best(run: Measured, unit: Unit) -> str:
    return f"{_figure(run.best, unit)} at {run.best_epoch} of {run.epochs}"


def _time(row: Row) -> str:
    known = [run.seconds for run in row.runs if run.seconds is not None]
    return human_seconds(sum(known) / len(known)) if known else NOTHING


def _goal(goal: Goal) -> tuple[str, ...]:
    return (goal.text, goal.measured, VERDICTS[goal.met])


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table."""
    yield _grid_line(header)
    yield _grid_line(["---"] * len(header))
    for row in rows:
        yield _grid_line(row)


def _grid_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _block(title: str, values: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"## {title}"
    yield ""
    yield "```yaml"
    for key, value in values.items():
        # Lists and mappings stay on the line of their key.
        flow = None if isinstance(value, list | dict) else False
        text = yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=flow, width=1000)
        yield text.rstrip()
    yield "```"
