"""The short table of CIFAR-100 runs to its end, without a GPU, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.strips import write_strips

from cli.experiments.reproduce.sdd_cifar100 import METHODS, title_of

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "short_sdd.py"

PAIR = "resnet32x4 -> resnet8x4"

SIZES = ["--epochs", "3", "--seeds", "1", "--batch-size", "8"]
"""With 48 images: enough steps for a teacher that a recording accepts."""


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_the_page_has_a_figure_for_the_teacher_and_every_method(tmp_path):
    data = write_strips(tmp_path / "strips")
    folders = ["--out", str(tmp_path / "out"), "--data", str(data), "--work", str(tmp_path)]
    command = [sys.executable, str(SCRIPT), *folders, "--device", "cpu", *SIZES]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "out" / "sdd-cifar100-short.md").read_text()
    assert f"`python benchmarks/short_sdd.py {' '.join(SIZES)}`" in page
    assert "failed" not in page
    for name in ("teacher", *(f"student, {title_of(method)}" for method in METHODS)):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {PAIR}: {name} |")]
        assert float(row.split(" | ")[2]) > 50
