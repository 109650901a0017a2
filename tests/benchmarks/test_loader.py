"""The benchmark of loaders measures both of them, for every recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loader.py"


def test_every_recipe_has_a_line_for_a_batch_and_for_a_step():
    command = [sys.executable, str(SCRIPT), "--samples", "16", "--rounds", "1", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 4
    for _, _, workers, device, ratio in lines[1:]:
        assert min(float(workers), float(device)) > 0
        assert float(ratio.split()[0]) > 0
