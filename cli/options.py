"""Arguments that several commands share, and how results are printed."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

File = Annotated[str, typer.Argument(help="A YAML file.", metavar="FILE", show_default=False)]
CacheUrl = Annotated[
    str,
    typer.Argument(help="A path, s3://... or http(s)://...", metavar="CACHE", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override a value of the file; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]


def emit(document: Any, *, as_json: bool, text: str) -> None:
    """Print a result: the document for programs, or the text for people."""
    if as_json:
        typer.echo(json.dumps(document, default=_plain, allow_nan=False))
    else:
        typer.echo(text)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple | set):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
