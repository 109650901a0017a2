"""Memory is the student's: it stays flat while the cache grows tenfold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.builds import build_document, write_file

ALLOWANCE = 24 << 20
"""Bytes by which a peak may differ between two runs: allocator arenas and import order."""

RUN = """
import json, resource, sys
from cli.main import run
sys.argv = ["kd-cache", *sys.argv[1:]]
try:
    run()
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""


def _peak(*arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(json.loads(done.stdout.splitlines()[-1]))


def _build_file(folder: Path, num_seeds: int) -> Path:
    # 16 cells of 2000 classes are 64 kB a row: ten seeds are 60 MB, and would show.
    document = build_document(
        str(folder / f"cache{num_seeds}"),
        seeds=f"0:{num_seeds}",
        teacher={
            "model": "support.toys:tiny_net",
            "allow_untrained": True,
        },
        dataset={
            "name": "support.toys:patches",
            "args": {"num_samples": 96, "num_classes": 2000},
        },
        scales=[1, 4],
        layout={"shard_rows": 32, "chunk_rows": 8},
    )
    return write_file(folder / f"build{num_seeds}.yaml", document)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("memory")


@pytest.mark.timeout(300)
def test_build_and_train_memory_stay_flat_while_the_cache_grows_tenfold(folder):
    peaks = {}
    for num_seeds in (1, 10):
        build = _build_file(folder, num_seeds)
        peaks["build", num_seeds] = _peak("build", str(build))
        train = {
            "dataset": yaml.safe_load(build.read_text())["dataset"],
            "caches": str(folder / f"cache{num_seeds}"),
            "student": {"model": "support.toys:tiny_net"},
            "method": {"name": "sd-kd"},
            "optimizer": {"name": "sgd", "lr": 0.01},
            "epochs": num_seeds,
            "batch_size": 16,
            "workers": 0,
            "device": "cpu",
            "out": str(folder / f"run{num_seeds}"),
        }
        file = write_file(folder / f"train{num_seeds}.yaml", train)
        peaks["train", num_seeds] = _peak("train", str(file))
    sizes = {
        n: sum(p.stat().st_size for p in (folder / f"cache{n}").rglob("*") if p.is_file())
        for n in (1, 10)
    }
    assert sizes[10] > 9 * sizes[1] > 9 * (5 << 20)
    assert peaks["build", 10] - peaks["build", 1] < ALLOWANCE
    assert peaks["train", 10] - peaks["train", 1] < ALLOWANCE
