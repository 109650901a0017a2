"""The errors and the source tree to Markdown, read from the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from cache_service import errors as family

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cache_service", "distill", "cli")

TOLD_AS_ONE = {
    "cache_service/models/zoo",
    "distill/losses",
    "distill/methods",
}
"""Folders of many alike files: one line and the files' names."""

WIDTH = 108
COLUMN = 27


def error_classes() -> list[type[family.KdCacheError]]:
    """Every error that users can meet, by exit code and code."""
    found = [
        each
        for each in vars(family).values()
        if isinstance(each, type)
        and issubclass(each, family.KdCacheError)
        and each is not family.KdCacheError
    ]
    return sorted(found, key=lambda each: (each.exit_code, each.code))


def errors() -> str:
    """One line an error."""
    rows = ["| code | exit code | HTTP status | class | meaning |", "|---|---|---|---|---|"]
    for each in error_classes():
        meaning = (each.__doc__ or "").strip()
        rows.append(
            f"| [`{each.code}`](#{each.code}) | {each.exit_code} | {each.http_status} "
            f"| `{each.__name__}` | {meaning} |"
        )
    return "\n".join(rows)


def tree() -> str:
    """The packages with the first words of each file's own docstring."""
    lines: list[str] = []
    for package in PACKAGES:
        lines += [*_folder(ROOT / package, 0), ""]
    return "```\n" + "\n".join(lines).rstrip() + "\n```"


def _folder(folder: Path, depth: int) -> Iterator[str]:
    yield _line(f"{folder.name}/", _words(folder / "__init__.py"), depth)
    files = sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")
    if folder.relative_to(ROOT).as_posix() in TOLD_AS_ONE:
        yield from _names([file.stem for file in files], depth + 1)
        return
    for each in sorted(path for path in folder.iterdir() if (path / "__init__.py").is_file()):
        yield from _folder(each, depth + 1)
    for file in files:
        yield _line(file.name, _words(file), depth + 1)


def _line(name: str, words: str, depth: int) -> str:
    left = "  " * depth + name
    return f"{left:<{COLUMN}}{words}".rstrip()


def _names(stems: list[str], depth: int) -> Iterator[str]:
    line = "  " * depth
    for stem in stems:
        if len(line) + len(stem) + 2 > WIDTH:
            yield line.rstrip()
            line = "  " * depth
        line += stem + "  "
    yield line.rstrip()


def _words(file: Path) -> str:
    """The first sentence of a docstring, cut where it pauses if it is long."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    first = " ".join(text.partition("\n\n")[0].split()).replace("`", "")
    sentence = re.split(r"(?<=[.?!]) ", first)[0].rstrip(".")
    room = WIDTH - COLUMN
    if len(sentence) > room:
        heads = [sentence[:room].rpartition(pause)[0] for pause in (": ", "; ", ", ")]
        sentence = next((head for head in heads if head), sentence)
    return sentence
