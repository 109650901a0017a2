"""One wheel with three packages and nothing else, which runs outside of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from support.pages import ROOT
from support.sources import PACKAGES

pytest.importorskip("setuptools", reason="building a wheel offline needs setuptools")


def run(*words, **options):
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # A copy, because setuptools leaves folders behind where it builds.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # What must stay out although it lies there.
    for name in ("tests", "docs", "examples"):
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    script = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    run(sys.executable, "-c", script, out, cwd=source)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_three_packages_whole_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    wanted = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for pattern in ("*.py", "*.css", "*.html", "*.js", "*.svg", "py.typed")
        for file in (ROOT / package).rglob(pattern)
    }
    assert wanted <= names


def test_an_installed_wheel_runs_outside_of_the_checkout(wheel, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--disable-pip-version-check", "--target", target, wheel)
    environment = os.environ | {"PYTHONPATH": str(target)}
    where = "from importlib.util import find_spec as f\nfor name in {}: print(f(name).origin)"
    files = run(sys.executable, "-c", where.format(PACKAGES), cwd=elsewhere, env=environment)
    assert all(file.startswith(str(target)) for file in files.split())
    told = run(target / "bin" / "kd-cache", "--help", cwd=elsewhere, env=environment)
    assert "build" in told
    assert run(target / "bin" / "kd-cache", "--version", cwd=elsewhere, env=environment) == (
        "kd-cache 0.1.0\n"
    )
