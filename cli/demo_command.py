"""`demo`."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from cache_service.errors import ConfigError
from cli.options import Json, emit

DEFAULT_OUT = "demo-out"

NEEDED = ("sklearn", "torch", "torchvision", "timm", "PIL")
"""What the demo extra brings, by the names they are imported under."""


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(demo)


def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for everything.")] = DEFAULT_OUT,
    json: Json = False,
) -> None:
    """Train a teacher on handwritten digits, record it, train a student four ways, and report."""
    require_extra()
    from rich.console import Console

    from cli.experiments.demo.run import report_path, run_demo
    from cli.experiments.demo.table import caption, make_table, summary

    result = run_demo(out, say=lambda line: typer.echo(line, err=True))
    report = report_path(out)
    if json:
        emit(result.document(report), as_json=True, text="")
        return
    console = Console(highlight=False)
    console.print(caption(result), soft_wrap=True)
    console.print(make_table(result))
    for line in summary(result, report):
        console.print(line, soft_wrap=True)


def require_extra() -> None:
    """Refuse before anything is imported that is not installed.

    Raises:
        ConfigError: names what is missing and how to get it.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"kd-cache demo needs {', '.join(missing)}, not installed here.",
            hint="Run `pip install 'kd-cache[demo]'`.",
        )
