"""The entry point of `kd-cache`.

A command parses its arguments, calls the library once and prints the result. Heavy imports are
inside the commands, so that `kd-cache --help` does not wait for torch. An error of the library is
printed as one line, without a traceback, and has its own exit code.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Annotated

import typer

from cache_service.errors import ConfigError, KdCacheError, UnsupportedError
from cli import (
    build_commands,
    cache_commands,
    distill_command,
    experiment_commands,
    serve_command,
    train_commands,
)

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as in shells. SIGTERM is handled in the same way."""

EXTRAS = {
    "torch": "train",
    "torchvision": "train",
    "timm": "train",
    "PIL": "train",
    "sklearn": "demo",
    "fastapi": "serve",
    "uvicorn": "serve",
    "httptools": "serve",
    "prometheus_client": "serve",
    "jinja2": "serve",
}
"""The extra that installs each optional module. The core can read and verify caches."""

ONE_PROCESS = ("demo", "distill", "experiment", "cycle", "reproduce", "bench")
"""Commands that train several times, in one process each; torchrun would run them several times."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Record a teacher once per augmentation seed; train students from the recording.",
)
app.command()(experiment_commands.demo)  # the command to start with is the first in the list
COMMANDS = (
    distill_command,
    build_commands,
    cache_commands,
    serve_command,
    train_commands,
    experiment_commands,
)
for module in COMMANDS:
    module.register(app)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        try:
            number = version("kd-cache")
        except PackageNotFoundError:
            number = "(not installed)"
        typer.echo(f"kd-cache {number}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print and exit."),
    ] = False,
) -> None:
    """Record a teacher once per augmentation seed; train students from the recording."""
    name, world = context.invoked_subcommand, os.environ.get("WORLD_SIZE", "1")
    if name in ONE_PROCESS and world != "1":
        raise UnsupportedError(
            f"kd-cache {name} was started by torchrun (WORLD_SIZE={world}), which would run it "
            f"{world} times; only train divides its work.",
            hint="Start it without torchrun.",
        )


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run() -> None:
    """Run the command line and exit with the code of its result."""
    # SIGTERM ends a command like Ctrl-C, so that it saves its work and can be resumed.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(standalone_mode=True)
    except KdCacheError as refusal:
        if _rank():  # torchrun ends all ranks as soon as one ends, which this one is about to do
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        typer.echo(f"{_rank()}error[{refusal.code}]: {refusal}", err=True)
        sys.exit(refusal.exit_code)
    except ModuleNotFoundError as missing:
        extra = EXTRAS.get((missing.name or "").partition(".")[0])
        if extra is None:
            raise
        typer.echo(
            f"error[config]: this command needs {missing.name}, which is not installed. "
            f"pip install 'kd-cache[{extra}]'",
            err=True,
        )
        sys.exit(ConfigError.exit_code)
    except SystemExit as end:  # typer exits with this status after Ctrl-C, without a message
        if end.code == INTERRUPTED:
            typer.echo(f"{_rank()}interrupted; the same command resumes", err=True)
        raise


def _rank() -> str:
    """Whose message it is, where torchrun started several processes."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return "" if alone else f"rank {os.environ.get('RANK', '?')}: "


if __name__ == "__main__":  # `python -m cli.main`, where the package is not installed
    run()
