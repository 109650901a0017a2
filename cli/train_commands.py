"""The commands `train` and `evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from cli.options import File, Json, Settings, emit

if TYPE_CHECKING:
    from distill.reporting import Event


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(train)
    app.command()(evaluate)


def train(file: File, settings: Settings = None, json: Json = False) -> None:
    """Train students from recorded teachers. Resumes from checkpoints in the file's `out`.

    Under torchrun, all processes train the same students together, and the first one prints.
    """
    from cache_service.processes import launched_rank
    from distill.multi_student import load_students
    from distill.trainer import train_students

    configs = load_students(file, settings or [])
    rank, _ = launched_rank()
    with show_progress() if rank == 0 else nullcontext() as listener:
        results = train_students(configs, on_event=listener)
    if rank > 0:
        return
    documents = {name: _outcome(configs[name], result.history) for name, result in results.items()}
    lines = [
        f"{each['out']}: {each['steps']} steps of {each['method']}" for each in documents.values()
    ]
    scores = {name: each["evaluation"] for name, each in documents.items() if "evaluation" in each}
    _emit_students(documents, as_json=json, lines=[*lines, *_score_lines(scores)])


def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A run's folder, or its checkpoint.pt or student.safetensors.",
            show_default=False,
        ),
    ],
    cache: Annotated[
        str | None,
        typer.Option(help="Evaluate on the views of this cache; adds agreement with its teacher."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="YAML",
            help="Evaluate on this dataset, such as '{name: digits, split: test}'.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    json: Json = False,
) -> None:
    """Compute top-1 and top-5 accuracy, calibration error, and agreement with a cached teacher."""
    from cache_service.config import parse_yaml, validate_config
    from cache_service.datasets import DatasetConfig
    from distill.checkpoint import find_checkpoints
    from distill.evaluate import evaluate_checkpoint

    chosen = None
    if dataset is not None:
        document = parse_yaml(dataset, where="--dataset")
        chosen = validate_config(DatasetConfig, document, where="--dataset")
    scores = {
        name: _scores(evaluate_checkpoint(path, dataset=chosen, cache=cache, device=device))
        for name, path in find_checkpoints(checkpoint).items()
    }
    _emit_students(scores, as_json=json, lines=_score_lines(scores))


SHOWN = ("loss", "top1", "eval_top1", "lr")
"""Values that the progress bar shows. The metrics files contain all values."""

NOTES = ("weights", "notice")
"""Values of the start of a run that are shown as lines of text."""

SHARED_NOTES = {"not_taken": "dataset: not taken", "loader": "views made by"}
"""The same for values that all students share, with their titles."""


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[Callable[[Event], None]]:
    """Provide a listener for `train`.

    It shows a progress bar per student on a terminal, and otherwise prints a JSON line per event.
    """
    from cache_service.progress import ProgressDisplay
    from distill.reporting import finite

    latest: dict[str, dict[str, str]] = {}

    def listen(event: Event) -> None:
        if not display.is_terminal:
            display.write_event(finite(event.document()))
            return
        for key, title in SHARED_NOTES.items():
            if key in event.values and not latest:  # once for all students
                display.show_message(f"{title}: {event.values[key]}")
        values = latest.setdefault(event.student, {})
        for name in SHOWN:
            value = event.values.get(name)
            if isinstance(value, int | float):
                values[name] = f"{name} {value:.4g}"
        title = f"{event.student}: " if event.student else ""
        for note in NOTES:
            if event.kind == "start" and note in event.values:
                display.show_message(f"{title}{note}: {event.values[note]}")
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


def _outcome(config: Any, history: Any) -> dict[str, Any]:
    document = {"out": config.out, "steps": history.step, "method": config.method.name}
    if history.last is not None:
        document["evaluation"] = _scores(history.last)
        document["best"] = None if history.best is None else _scores(history.best)
    return document


def _scores(evaluation: Any) -> dict[str, Any]:
    return dict(evaluation._asdict())


def _emit_students(
    documents: dict[str, dict[str, Any]], *, as_json: bool, lines: list[str]
) -> None:
    """Print the document of a single student, or a list of named documents for several."""
    document: dict[str, Any] = {
        "students": [{"name": name, **each} for name, each in documents.items()]
    }
    if set(documents) == {""}:
        document = documents[""]
    emit(document, as_json=as_json, text="\n".join(lines))


def _score_lines(scores: dict[str, dict[str, Any]]) -> list[str]:
    """Format a line of scores for each student, which starts with its name if it has one."""
    width = max(map(len, scores), default=0)
    return [f"{name:{width}}  {_score_line(each)}".lstrip() for name, each in scores.items()]


def _score_line(scores: dict[str, Any]) -> str:
    parts = [
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in scores.items()
        if value is not None
    ]
    return "  ".join(parts)
