"""The benchmark of views measures every variant on any folder of images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "views.py"


def test_every_variant_has_a_line_with_its_ratio(tmp_path):
    for number in range(16):
        folder = tmp_path / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    command = [sys.executable, str(SCRIPT), "--images", str(tmp_path), "--size", "16"]
    done = subprocess.run(
        [*command, "--rounds", "1"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 7
    for _, milliseconds, ratio, _ in lines[1:]:
        assert float(milliseconds) > 0
        assert float(ratio.split()[0]) > 0
