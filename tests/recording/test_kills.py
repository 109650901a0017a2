"""kill -9 at any instant, then the same build again: the same bytes, and one shard lost at most.

The small form forks builders from this process, which has torch loaded already, so that a kill
costs a fraction of a second; the full form kills the real command.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.builds import (
    build_document,
    open_toy,
    record_toy,
    tree_bytes,
    write_file,
)

from cache_service.recording.engines import prepare
from cache_service.recording.record import open_writer, record
from cache_service.rows.reader import open_cache
from cache_service.rows.writer import CacheWriter

SIZES = {
    "seeds": "0:4",
    "dataset": {"name": "support.toys:patches", "args": {"num_samples": 320}},
    "layout": {"shard_rows": 32, "chunk_rows": 8},
}
NUM_SHARDS = 40


def _build_in_child(cache: str, log: Path) -> None:
    """Record, noting each shard in a log as soon as the teacher has answered all of it."""
    write_shard = CacheWriter.write_shard

    def noted(self, seed, shard, *rest):
        with log.open("a") as file:
            file.write(f"{seed}/{shard}\n")
        return write_shard(self, seed, shard, *rest)

    CacheWriter.write_shard = noted
    build = open_toy(cache, **SIZES)
    prepare(build)
    record(build, open_writer(build), seeds=build.config.seeds)
    os._exit(0)  # the parent's test machinery must not run its exits here


def _committed(cache: Path) -> int:
    return len(list((cache / "commits").glob("*/*.json")))


def test_thirty_kills_lose_at_most_one_answered_shard_each_and_no_byte(tmp_path):
    record_toy(str(tmp_path / "whole"), **SIZES)
    cache, log = tmp_path / "killed", tmp_path / "log"
    rng, kills = random.Random(5), 0
    # The server has imported torch but never run it: its children start fast and threadless.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.builds"])
    while kills < 30:
        child = context.Process(target=_build_in_child, args=(str(cache), log))
        child.start()
        before = _committed(cache) if cache.exists() else 0
        # Wait for some progress, so that the kills fall all over the build, then not long.
        patience = time.monotonic() + 20
        target = min(before + 1, NUM_SHARDS - 1)
        while child.is_alive() and time.monotonic() < patience:
            if cache.exists() and _committed(cache) >= target:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        if not child.is_alive():
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
        if cache.exists() and (cache / "zarr.json").exists():
            opened = open_cache(str(cache))
            for seed, shards in opened.commits().items():
                for shard in shards:
                    start, stop = opened.spec.shard_range(shard)
                    opened.read(seed, start, stop)
    child = context.Process(target=_build_in_child, args=(str(cache), log))
    child.start()
    child.join()
    assert kills >= 25
    answered = len(log.read_text().split())
    assert answered - NUM_SHARDS <= kills
    assert tree_bytes(cache) == tree_bytes(tmp_path / "whole")
    assert not (cache / ".scratch").exists()


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_thirty_kills_of_the_real_command_leave_an_identical_cache(tmp_path):
    sizes = SIZES | {"dataset": {"name": "support.toys:patches", "args": {"num_samples": 3200}}}
    sizes |= {"seeds": "0:3"}
    record_toy(str(tmp_path / "whole"), **sizes)
    file = write_file(tmp_path / "b.yaml", build_document(str(tmp_path / "killed"), **sizes))
    command = [sys.executable, "-c", "from cli.main import run; run()", "build", str(file)]
    rng, kills = random.Random(6), 0
    while kills < 30:
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            child.wait(timeout=rng.uniform(2, 9))
            break
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            kills += 1
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_cleanly_with_130_and_resume(tmp_path, number):
    sizes = SIZES | {"seeds": "0:200"}
    file = write_file(tmp_path / "b.yaml", build_document(str(tmp_path / "c"), **sizes))
    command = [sys.executable, "-c", "from cli.main import run; run()", "build", str(file)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    patience = time.monotonic() + 60
    while time.monotonic() < patience and not list((tmp_path / "c").glob("commits/*/*.json")):
        time.sleep(0.05)
    child.send_signal(number)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1] == "interrupted; the same command resumes"
    assert not (tmp_path / "c" / ".scratch").exists()
    cache = open_cache(str(tmp_path / "c"))
    committed = cache.commits()
    assert committed
    cache.read(0, 0, 32)
