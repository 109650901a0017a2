"""The command `distill`: a folder of images, a teacher and a student, and nothing else."""

from __future__ import annotations

from typing import Annotated

import typer

from cache_service.errors import NonFiniteError
from cli.options import Json, emit

Folder = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="One subfolder of images for each class, or train and val with such subfolders.",
        show_default=False,
    ),
]
Teacher = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="timm's name (with its published weights), torchvision/NAME or module:factory.",
        show_default=False,
    ),
]
Student = Annotated[
    str,
    typer.Option(metavar="NAME", help="The network to train; as above.", show_default=False),
]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="FILE", help="The teacher's weights for these classes.")
]
TrainTeacher = Annotated[
    int | None,
    typer.Option(
        metavar="EPOCHS", help="Train the teacher on DIR first, from its published weights."
    ),
]
Method = Annotated[str, typer.Option(metavar="NAME", help="Loss; see docs/methods.md.")]
Seeds = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Epochs of views to record, or seeds such as 0:10; by default EPOCHS, at most 10.",
    ),
]
Size = Annotated[int | None, typer.Option(help="Side of the views, px; by default the teacher's.")]
HoldOut = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", help="Of each class for evaluation; 0.2 where DIR has no val or test."
    ),
]
Name = Annotated[
    str | None,
    typer.Option(help="Name of the student in files and folders; by default its network's."),
]
Out = Annotated[
    str | None,
    typer.Option(metavar="OUT", help="Output folder; by default distill-out and DIR's name."),
]
Baseline = Annotated[
    bool, typer.Option(help="Also train the same student from labels alone, on the same views.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and print the cost, then stop.")
]
Sections = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=VALUE",
        help="A key of the files by its section: teacher, student, dataset, evaluate, augment, "
        "method, codec, build or train; repeatable.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(distill)


def distill(
    folder: Folder,
    teacher: Teacher,
    student: Student,
    teacher_checkpoint: Checkpoint = None,
    train_teacher: TrainTeacher = None,
    method: Method = "kd",
    epochs: Annotated[int, typer.Option(help="Passes of the student over the images.")] = 30,
    seeds: Seeds = None,
    runs: Annotated[int, typer.Option(help="Students of each kind, from other weights.")] = 1,
    size: Size = None,
    hold_out: HoldOut = None,
    name: Name = None,
    out: Out = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    baseline: Baseline = True,
    dry_run: DryRun = False,
    settings: Sections = None,
    json: Json = False,
) -> None:
    """Record a teacher over a folder of images, train a student, and compare. Can be resumed."""
    from cli.experiments.distill_folder.request import Request
    from cli.experiments.distill_folder.run import run_distill

    request = Request(
        folder=folder,
        teacher=teacher,
        student=student,
        teacher_checkpoint=teacher_checkpoint,
        train_teacher=train_teacher,
        method=method,
        epochs=epochs,
        seeds=seeds,
        runs=runs,
        size=size,
        hold_out=hold_out,
        name=name,
        out=out,
        device=device,
        baseline=baseline,
        settings=tuple(settings or ()),
    )
    result = run_distill(
        request, dry_run=dry_run, on_message=lambda line: typer.echo(line, err=True)
    )
    emit(result.document(), as_json=json, text=result.text)
    if result.table is not None and any(row.failures for row in result.table.rows):
        raise typer.Exit(NonFiniteError.exit_code)
