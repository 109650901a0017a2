"""The harness of the GPU table runs where there is no GPU, on its smallest pair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_the_harness_measures_four_ways_and_writes_its_table(tmp_path):
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--pairs", "tiny"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads((tmp_path / "gpu.json").read_text())
    variants = [row["variant"] for row in document["rows"]]
    assert variants == ["alone", "live teacher, KD", "cache, KD", "cache, SD-KD"]
    assert all(row["views_per_s"] > 0 for row in document["rows"])
    assert all(row["peak_memory_bytes"] > 0 for row in document["rows"])
    table = (tmp_path / "gpu.md").read_text()
    assert table.count("resnet8x4 -> resnet8x4") == 4
