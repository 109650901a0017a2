"""House rules that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from support.pages import ROOT
from support.sources import EVERYWHERE, PACKAGES, functions, named, python_files

MAX_FUNCTION_LINES = 60

MARKS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


def test_every_function_fits_on_a_screen():
    long = {
        f"{named(file)}:{name}": lines
        for file in python_files(*EVERYWHERE)
        for name, lines in functions(file)
        if lines > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_the_packages_print_nothing():
    calls = [
        f"{named(file)}:{node.lineno}"
        for file in python_files(*PACKAGES)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"print", "pprint", "breakpoint"}
    ]
    assert calls == []


def test_nothing_is_left_for_later():
    marked = [
        f"{named(file)}:{number}"
        for file in python_files(*PACKAGES, "docs", "examples", "benchmarks")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if MARKS.search(line)
    ]
    assert marked == []


def test_every_file_of_the_packages_says_what_it_is_for_in_ascii():
    for file in python_files(*PACKAGES):
        text = file.read_text()
        assert text.isascii(), named(file)
        assert ast.get_docstring(ast.parse(text)), named(file)


def test_no_file_or_folder_is_called_utils():
    vague = {"utils", "util", "helpers", "misc", "common", "new", "final", "v2"}
    files = [Path(named(file)) for file in python_files(*PACKAGES)]  # below the checkout
    names = {part for file in files for part in [*file.parts, file.stem]}
    assert {"cache_service", "distill", "cli"} <= names
    assert not names & vague


def test_git_ignores_no_source_file():
    # A rule such as `build/` once hid a whole package from git, and from ruff with it.
    files = [named(file) for file in python_files(*EVERYWHERE)]
    try:
        done = subprocess.run(
            ["git", "check-ignore", "--no-index", "--stdin"],
            input="\n".join(files),
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode == 128:
        pytest.skip("this is not a git checkout")
    assert done.stdout.split() == []


def num_lines(file):
    return len(file.read_text().splitlines())
