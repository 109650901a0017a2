"""The command line to Markdown, read from the program itself."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import typer

from cli.main import app


def program() -> Any:
    """`kd-cache` as the library under typer sees it."""
    return typer.main.get_command(app)


def overview() -> str:
    """One line a command."""
    rows = ["| command | what it does |", "|---|---|"]
    for name, command in program().commands.items():
        required = [f"{each.opts[0]} {_value(each)}" for each in command.params if _is_needed(each)]
        usage = " ".join(["kd-cache", name, *map(_metavar, _arguments(command)), *required])
        rows.append(f"| `{usage}` | {_text(command.help)} |")
    return "\n".join(rows)


def reference() -> str:
    """Every command with its arguments and options."""
    return "\n\n".join(
        _section(name, command) for name, command in sorted(program().commands.items())
    )


def _section(name: str, command: Any) -> str:
    usage = " ".join(["kd-cache", name, "[OPTIONS]", *map(_metavar, _arguments(command))])
    rows = ["| | default | |", "|---|---|---|"]
    for each in command.params:
        if each.name == "help":
            continue
        shown = f"`{_spelled(each)}`"
        rows.append(f"| {shown} | {_default(each)} | {_text(each.help)} |")
    return f"## {name}\n\n{_text(command.help)}\n\n```\n{usage}\n```\n\n" + "\n".join(rows)


def _is_needed(option: Any) -> bool:
    return option.required and option.param_type_name == "option"


def _arguments(command: Any) -> Iterator[Any]:
    return (each for each in command.params if each.param_type_name == "argument")


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _spelled(each: Any) -> str:
    if each.param_type_name == "argument":
        return _metavar(each)
    names = "`, `".join([*each.opts, *each.secondary_opts])
    return names if each.is_flag else f"{names} {_value(each)}"


def _value(option: Any) -> str:
    if isinstance(option.default, Enum):
        return " or ".join(str(choice.value) for choice in type(option.default))
    return str(option.metavar or option.name.upper())


def _default(each: Any) -> str:
    value = getattr(each.default, "value", each.default)
    if each.required:
        return "required"
    return "" if value in (None, False, [], ()) else f"`{value}`"


def _text(words: str | None) -> str:
    return " ".join((words or "").split()).replace("|", "\\|")
