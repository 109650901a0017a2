"""`cycle`."""

from __future__ import annotations

import typer

from cli.options import File, Json, Settings, emit


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(cycle)


def cycle(file: File, settings: Settings = None, json: Json = False) -> None:
    """Train a student, record it as a teacher, and train the next one from both. Resumes."""
    from cli.experiments.cycle.config import load_cycle
    from cli.experiments.cycle.run import run_cycle

    config = load_cycle(file, settings or [])
    table = run_cycle(config, where=file, say=lambda line: typer.echo(line, err=True))
    emit(table.model_dump(mode="json"), as_json=json, text=table.page().rstrip())
