"""The script for a GPU runs where there is none: its parts are processes with limits of time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_part_writes_its_page_and_a_failed_one_costs_only_itself(tmp_path):
    missing = str(tmp_path / "nowhere")
    parts = ["--parts", "reproduce", "total", "--data", missing, "--work", str(tmp_path / "work")]
    done = run("--out", str(tmp_path), "--device", "cpu", "--quick", *parts)
    assert done.returncode == 1
    assert "reproduce: failed" in done.stdout
    assert missing in done.stdout
    assert "total: done" in done.stdout
    assert "resnet8x4 -> resnet8x4" in (tmp_path / "total.md").read_text()


def test_a_part_that_does_not_exist_is_refused(tmp_path):
    done = run("--out", str(tmp_path), "--parts", "stepp")
    assert done.returncode == 2
    assert "stepp" in done.stderr
