"""The repository's Python files, parsed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from support.pages import ROOT

PACKAGES = ("cache_service", "distill", "cli")
EVERYWHERE = (*PACKAGES, "tests", "docs", "examples", "benchmarks")


def python_files(*folders: str) -> list[Path]:
    """Python files below these folders of the repository."""
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function in a file, methods and inner ones too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def named(file: Path) -> str:
    """The file's path in the repository."""
    return file.relative_to(ROOT).as_posix()
