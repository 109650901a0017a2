"""`reproduce`."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Json, emit


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(reproduce)


def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="hinton-mnist, omitted-three, sdd-cifar100, deit-cifar100 or ddgsd-cifar100.",
            show_default=False,
        ),
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer epochs, one seed: minutes instead of hours.")
    ] = False,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Folder for everything.")
    ] = "reproduce-out",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="The dataset's files; data/mnist or data/cifar100 by default."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=100, help="Runs per figure; 3, or 1 with --quick.")
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEACHER:STUDENT",
            help="Of sdd-cifar100, such as resnet32x4:resnet8x4; repeatable.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda; of the tables on CIFAR-100.")
    ] = None,
    json: Json = False,
) -> None:
    """Train a published table again and write it beside the published figures. Resumes."""
    from cli.experiments.reproduce.order import Order
    from cli.experiments.reproduce.registry import find_reproduction, refuse_device, refuse_options
    from cli.experiments.reproduce.run import run_reproduction

    reproduction = find_reproduction(name)
    refuse_options(reproduction, pair=pair, device=device)
    refuse_device(device or "auto")
    order = Order(
        out=out,
        data=data or reproduction.data,
        seeds=seeds or (1 if quick else reproduction.seeds),
        quick=quick,
        say=lambda line: typer.echo(line, err=True),
        pairs=tuple(pair or ()),
        device=device or "auto",
    )
    written = run_reproduction(reproduction, order)
    paths = {"markdown": written.markdown_path, "json": written.json_path}
    emit(
        {**written.table.document(), "written": paths},
        as_json=json,
        text=f"{written.page}\n{written.markdown_path} and {written.json_path}",
    )
