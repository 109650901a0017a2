"""A reproduction's table as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from cli.options import human_seconds
from cli.reproduce.table import Goal, Measured, Row, Table

NOTHING = "-"

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
    yield from _grid(header, [_row(row) for row in table.rows])
    yield ""
    yield (
        "Figures are numbers of test errors; measured ones are mean and standard deviation over "
        "seeds. The best epoch is chosen on the test set, so it flatters: compare the last."
    )
    yield ""
    yield from _grid(("wanted", "measured", ""), [_goal(goal) for goal in table.goals])
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
    yield from _grid(("", "time"), [(name, human_seconds(value)) for name, value in parts])


def _row(row: Row) -> tuple[str, ...]:
    return (
        row.what,
        NOTHING if row.published is None else str(row.published),
        _mean(row),
        "; ".join(_run(run) for run in row.runs) or NOTHING,
        "; ".join(_best(run) for run in row.runs if run.best is not None) or NOTHING,
        _time(row),
    )


def _mean(row: Row) -> str:
    if row.mean is None:
        return "**failed**"
    text = f"{row.mean:.1f}" if len(row.values) > 1 else f"{row.mean:.0f}"
    if row.spread is not None:
        text += f" +- {row.spread:.1f}"
    return f"{text} (**{len(row.failures)} failed**)" if row.failures else text


def _run(run: Measured) -> str:
    return f"seed {run.seed}: {run.last if run.failure is None else f'failed: {run.failure}'}"


def _best(run: Measured) -> str:
    return f"{run.best} at {run.best_epoch} of {run.epochs}"


def _time(row: Row) -> str:
    known = [run.seconds for run in row.runs if run.seconds is not None]
    return human_seconds(sum(known) / len(known)) if known else NOTHING


def _goal(goal: Goal) -> tuple[str, ...]:
    return (goal.text, goal.measured, VERDICTS[goal.met])


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
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
