"""The benchmarks of a bucket and of a slow worker run, and say what the pages quote of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import s3

SCRIPTS = Path(__file__).parents[2] / "benchmarks"

# Builds with a worker that is stopped for most of the time: minutes on busy cores.
pytestmark = [pytest.mark.faults, pytest.mark.timeout(700)]


def output(script, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=680,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_student_of_a_bucket_is_compared_with_one_of_a_folder():
    s3.moto_environment()  # skips where there is no server to start
    found = json.loads(output("buckets.py", "--samples", "64", "--rounds", "1"))
    rates = [
        found[f"{epochs}_{clock}_s"] for epochs in ("first", "steady") for clock in ("wall", "cpu")
    ]
    assert min(rates) > 0
    assert found["bytes_fetched_over_bytes_of_rows"] == pytest.approx(1, abs=0.001)
    assert found["requests_a_run"] < 30


def test_reading_from_a_bucket_is_compared_with_reading_from_a_folder():
    s3.moto_environment()
    found = json.loads(output("buckets.py", "--read", "512", "--rounds", "1"))
    places = ("folder", "bucket_first", "bucket_again")
    assert min(found[f"{place}_rows_per_s"] for place in places) > 0
    assert found["row_bytes"] == 2020


def test_a_slow_worker_is_compared_in_fixed_parts_and_with_shards_handed_out():
    pytest.importorskip("ray", reason="the ray extra is not installed")
    found = output("slow_worker.py", "--seeds", "1", "--rounds", "1", RAY_AUTH_MODE="disabled")
    line = re.fullmatch(r"parts (\S+) s, handed out (\S+) s, ratio (\S+)\n", found)
    assert line is not None, found
    assert min(map(float, line.groups())) > 0
