"""Numbers and names formatted for people: messages, progress bars, pages and reports."""

from __future__ import annotations

import os
import re
from pathlib import Path


def human_bytes(count: float) -> str:
    """Formats a number of bytes: `1536` becomes `1.5 kB`. Units are powers of ten."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def human_seconds(seconds: float | None) -> str:
    """Formats a duration: `3700` becomes `1 h 02 min`, None becomes `unknown`."""
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    return f"{minutes} min" if hours == 0 else f"{hours} h {minutes - 60 * hours:02d} min"


def natural_key(name: str) -> list[int | str]:
    """Sort key that puts "class 9" before "class 10", as timm does."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


def describe_error(error: BaseException) -> str:
    """The class and the text of another library's error in one line: `OSError: disk on fire`."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def one_line(error: BaseException) -> str:
    """The first line of what another library says, as a sentence; its class if it says nothing."""
    lines = str(error).strip().splitlines()
    first = lines[0].rstrip() if lines else type(error).__name__
    return first if first.endswith((".", "!", "?")) else f"{first}."


def printable_path(path: str | Path) -> str:
    """A path in one line of valid Unicode, whatever bytes the file system has in it."""
    return os.fsencode(path).decode(errors="backslashreplace").replace("\n", "\\n")
