"""The commands `experiment`, `demo`, `reproduce`, `cycle` and `bench`, which print a table."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from cache_service.errors import ConfigError
from cli.options import File, Json, Settings, emit

DEMO_PACKAGES = ("sklearn", "torch", "torchvision", "timm", "PIL")
"""Import names of the packages that the demo needs."""

BenchName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="step, memory, build, total, stream, views, codec or http.",
        show_default=False,
    ),
]

AnswersCache = Annotated[
    str | None,
    typer.Option(metavar="CACHE", help="Cache with every class, for codec: the answers to encode."),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (experiment, cycle, reproduce, bench):
        app.command()(command)


def _on_message(line: str) -> None:
    typer.echo(line, err=True)


def experiment(
    file: File,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Output folder; by default the file's.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run the short form that the file describes.")
    ] = False,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Train students by several methods and seeds and compare them in a table. Can be resumed."""
    from pathlib import Path

    from cli.experiments.experiment_file import load_experiment
    from cli.experiments.runner import run_experiment, write_results

    config = load_experiment(file, settings or [], quick=quick)
    folder = out or config.out
    if quick:  # a separate folder, because short and full runs must not resume each other
        folder = str(Path(folder, "quick"))
    config = config.model_copy(update={"out": folder})
    result = run_experiment(config, where=file, on_message=_on_message)
    command = f"kd-cache experiment {file}{' --quick' if quick else ''}"
    table = result.table(name=Path(file).stem, command=command, quick=quick)
    written = write_results(table, result.curves(), out=folder, name="experiment")
    emit(
        {**table.document(), "written": written.paths},
        as_json=json,
        text=f"{written.page}\nReport: {written.paths['report']}",
    )


def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Output folder.")] = "demo-out",
    json: Json = False,
) -> None:
    """Train and record a teacher of handwritten digits, then train a student in four ways."""
    missing = [name for name in DEMO_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"kd-cache demo needs {', '.join(missing)}, not installed here.",
            hint="Run `pip install 'kd-cache[demo]'`.",
        )
    from rich.console import Console

    from cli.experiments.demo import report
    from cli.experiments.demo.run import run_demo

    result = run_demo(out, on_message=_on_message)
    path = report.write_report(result)
    if json:
        emit(result.document(path), as_json=True, text="")
        return
    console = Console(highlight=False)
    console.print(report.caption(result), soft_wrap=True)
    console.print(report.terminal_table(result))
    for line in (report.describe_costs(result), report.describe_agreement(result)):
        console.print(line, soft_wrap=True)
    console.print(f"Report: {path}", soft_wrap=True)


def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="hinton-mnist, omitted-three, sdd-cifar100, deit-cifar100, ddgsd-cifar100 or "
            "seeds-cifar100.",
            show_default=False,
        ),
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer epochs and one seed; takes minutes, not hours.")
    ] = False,
    out: Annotated[str, typer.Option(metavar="DIR", help="Output folder.")] = "reproduce-out",
    data: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Dataset folder; data/mnist or data/cifar100 by default."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=100, help="Seeds per figure; 3, or 1 with --quick.")
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEACHER:STUDENT",
            help="Networks of sdd-cifar100, such as resnet32x4:resnet8x4; repeatable.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda; only for CIFAR-100.")
    ] = None,
    json: Json = False,
) -> None:
    """Reproduce a published table and show the published figures for comparison. Can be resumed."""
    from cli.experiments.reproduce.reproductions import RUNS, find_reproduction, refuse_options
    from cli.experiments.reproduce.shipped import Options
    from cli.experiments.runner import write_results

    reproduction = find_reproduction(name)
    refuse_options(name, pair=pair, device=device)
    options = Options(
        name=name,
        out=out,
        data=data or reproduction.data,
        runs=seeds or (1 if quick else RUNS),
        quick=quick,
        on_message=_on_message,
        pairs=tuple(pair or ()),
        device=device or "auto",
    )
    table, curves = reproduction.make(options)
    written = write_results(table, curves, out=out, name=f"{name}-quick" if quick else name)
    emit(
        {**table.document(), "written": written.paths},
        as_json=json,
        text=f"{written.page}\n{', '.join(written.paths.values())}",
    )


def cycle(file: File, settings: Settings = None, json: Json = False) -> None:
    """Train a student, record it as a teacher, and train the next one from both. Can be resumed."""
    from cli.experiments.cycle import load_cycle, run_cycle

    config = load_cycle(file, settings or [])
    table = run_cycle(config, where=file, on_message=_on_message)
    emit(table.model_dump(mode="json"), as_json=json, text=table.page().rstrip())


def bench(
    name: BenchName,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEACHER:STUDENT",
            help="Networks, such as resnet50:resnet18; repeatable. For step, memory, build, total.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu or cuda. For step, memory, build and total.")
    ] = "cpu",
    images: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of JPEGs for views; generated ones by default."),
    ] = None,
    cache: AnswersCache = None,
    s3: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="s3://BUCKET/PREFIX for stream: it writes below it, and cleans up.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smallest sizes: seconds instead of minutes.")
    ] = False,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Also write the page and its figures here.")
    ] = None,
    json: Json = False,
) -> None:
    """Benchmark this machine: what a student costs from labels, from a cache and with its teacher.

    `step`, `memory`, `build` and `total` compare training from a cache with labels alone and with
    a live teacher. `stream` compares reading rows with a memory-mapped array and other formats,
    `views` the rendering of views with torchvision. `codec` compares how many bytes each codec
    takes with how exactly it keeps the teacher's answers, and `http` the service with a route that
    returns a constant.
    """
    from cli.experiments.bench.page import BenchOptions

    options = BenchOptions(tuple(pair or ()), device, quick, _on_message, images, s3, cache)
    if name == "http":  # imported alone, because it needs no torch
        from cli.experiments.bench.http_page import bench_http

        page, written = bench_http(options, out)
    else:
        from cli.experiments.bench.benchmarks import run_benchmark

        page, written = run_benchmark(name, options, out)
    emit(
        {**page.document(options), "written": written},
        as_json=json,
        text="\n".join([page.markdown(options).rstrip(), *written]),
    )
