"""ImageNet-21k at full size, without its pixels: what every process needs of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

NUM_SAMPLES, NUM_CLASSES, NUM_SEEDS = 14_197_122, 21_841, 90

OWN_MB = {
    "open the dataset": 100,
    "an order that nobody has computed": 400,
    "open the build": 100,
    "plan a new cache": 250,
    "start a loader worker, which renders a batch": 150,
    "in the loader worker": 30,
    "start a builder with nothing left to do": 150,
    "plan a complete cache": 150,
}
"""Largest memory of a process's own in MB, beyond that of the libraries; 1.5 to 4 times what was
measured, and a tenth of what lists of names take."""

SECONDS = 180
"""Of any step, on two busy cores."""


def measure(folder, *size):
    command = [sys.executable, "-m", "support.full_size", str(folder), *map(str, size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def info(cache):
    command = [
        sys.executable,
        "-c",
        "from cli.main import run; run()",
        "info",
        str(cache),
        "--json",
    ]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["complete"], time.perf_counter() - started


def test_every_step_of_the_simulation_works_at_a_small_size(tmp_path):
    found = measure(tmp_path, 300_000, 50, 2)
    assert found["figures"].keys() == OWN_MB.keys()
    assert found["shards"] == 2 * 19
    assert found["figures"]["in the loader worker"]["own_mb"] < OWN_MB["in the loader worker"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_imagenet_21k_is_opened_planned_and_continued_in_bounded_memory(tmp_path):
    found = measure(tmp_path, NUM_SAMPLES, NUM_CLASSES, NUM_SEEDS)
    assert found["shards"] == 867 * NUM_SEEDS
    assert found["rows"] == NUM_SAMPLES * NUM_SEEDS
    for step, figures in found["figures"].items():
        assert figures["own_mb"] < OWN_MB[step], (step, found)
        assert figures.get("seconds", 0) < SECONDS, (step, found)
    complete, seconds = info(tmp_path / "cache")
    assert complete == f"0:{NUM_SEEDS}"
    assert seconds < SECONDS
