"""The light parts stay light: what a fresh interpreter has loaded after an import, and how fast."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROWS = (
    "cache_service.errors",
    "cache_service.format.layout",
    "cache_service.format.group",
    "cache_service.storage",
    "cache_service.storage.local",
    "cache_service.reader",
    "cache_service.rows.reader",
    "cache_service.rows.writer",
    "cache_service.rows.verify",
)
HEAVY = ("torch", "torchvision", "timm", "PIL", "sklearn", "ray")
WEB = ("fastapi", "starlette", "uvicorn")

HELP_S = 0.5
"""CPU seconds that `kd-cache --help` may take. It takes about a third of that; waiting for a busy
machine is not counted."""


def loaded_after(*modules):
    """Names of all modules of a fresh interpreter that has imported these."""
    script = f"import json, sys, {', '.join(modules)}\njson.dump(sorted(sys.modules), sys.stdout)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_rows_are_read_written_and_checked_without_torch_or_pillow():
    assert not loaded_after(*ROWS) & {*HEAVY, *WEB}


def test_rows_are_served_without_torch_or_pillow():
    loaded = loaded_after("cache_service.api.app", "cache_service.api.server")
    assert not loaded & {*HEAVY, "zarr", "distill"}


def test_rows_are_read_without_zarr():
    assert "zarr" not in loaded_after("cache_service.rows.reader", "cache_service.rows.writer")


def test_rows_of_a_server_are_read_without_torch_zarr_or_a_web_framework():
    loaded = loaded_after("cache_service.remote.source", "cache_service.storage.http")
    assert not loaded & {*HEAVY, *WEB, "zarr", "obstore"}


def test_students_train_without_a_web_server_a_teacher_or_a_build():
    # Loads torch and timm, which takes a few seconds.
    loaded = loaded_after("distill", "distill.trainer", "distill.evaluate")
    assert not loaded & set(WEB)
    ours = {name for name in loaded if name.startswith("cache_service.")}
    builders = ("cache_service.teacher", "cache_service.recording", "cache_service.api")
    assert not {name for name in ours if name.startswith(builders)}


def test_the_command_line_starts_without_anything_heavy():
    assert not loaded_after("cli.main") & {*HEAVY, *WEB, "zarr", "obstore", "scipy", "matplotlib"}


def test_help_answers_at_once():
    kd_cache = Path(sys.executable).with_name("kd-cache")
    if not kd_cache.is_file():
        pytest.skip(f"kd-cache is not installed beside {sys.executable}")
    assert min(cpu_seconds([str(kd_cache), "--help"]) for _ in range(5)) < HELP_S


def cpu_seconds(command):
    """User CPU time of a child process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run(command, capture_output=True, check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
