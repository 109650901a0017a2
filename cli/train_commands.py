"""`train` and `evaluate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.options import File, Json, Settings, emit


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(train)
    app.command()(evaluate)


def train(file: File, settings: Settings = None, json: Json = False) -> None:
    """Train a student from recorded teachers. Resumes from the checkpoint in the file's `out`."""
    from distill.config import load_config
    from distill.progress import show_progress
    from distill.train import train as run

    config = load_config(file, settings or [])
    with show_progress() as listener:
        result = run(config, on_event=listener)
    history = result.history
    scores = None if history.last is None else _scores(history.last)
    document = {"out": config.out, "steps": history.step, "method": config.method.name}
    lines = [f"{config.out}: {history.step} steps of {config.method.name}"]
    if scores is not None:
        document["evaluation"] = scores
        document["best"] = _best(history)
        lines.append(_score_line(scores))
    emit(document, as_json=json, text="\n".join(lines))


def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="checkpoint.pt or its folder.", show_default=False
        ),
    ],
    cache: Annotated[
        str | None,
        typer.Option(help="Score on the views this cache recorded; adds agreement with it."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="YAML", help="Score on this dataset, such as '{name: digits, split: test}'."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    json: Json = False,
) -> None:
    """Top-1, top-5, calibration, and agreement with a cached teacher."""
    from cache_service.configfile import validate_config
    from cache_service.datasets import DatasetConfig
    from cache_service.yamltext import parse_yaml
    from distill.evaluate import evaluate_checkpoint

    chosen = None
    if dataset is not None:
        document = parse_yaml(dataset, where="--dataset")
        chosen = validate_config(DatasetConfig, document, where="--dataset")
    scores = _scores(evaluate_checkpoint(checkpoint, dataset=chosen, cache=cache, device=device))
    emit(scores, as_json=json, text=_score_line(scores))


def _scores(evaluation: Any) -> dict[str, Any]:
    return dict(evaluation._asdict())


def _best(history: Any) -> dict[str, Any] | None:
    return None if history.best is None else _scores(history.best)


def _score_line(scores: dict[str, Any]) -> str:
    parts = [
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in scores.items()
        if value is not None
    ]
    return "  ".join(parts)
