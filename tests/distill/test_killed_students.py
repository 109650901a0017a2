"""kill -9 of students that teach each other, anywhere, and as often as it takes."""

from __future__ import annotations

import multiprocessing
import random
import time

import pytest
from support.runs import curve, same, state_of
from support.streams import MemoryStream, train_config

from distill.trainer import train_students

KILLS = 25
NAMES = ("a", "b", "c")
SIZES = {"epochs": 10, "checkpoint_every": {"steps": 1}}


def train_peers(out):
    configs = {
        name: train_config(f"{out}/{name}", method={"name": "peers"}, seed=seed, **SIZES)
        for seed, name in enumerate(NAMES)
    }
    train_students(configs, stream=MemoryStream(configs["a"]))


@pytest.mark.faults
def test_peers_that_are_killed_go_on_from_one_step_to_the_same_weights(tmp_path):
    train_peers(tmp_path / "whole")
    # The server has imported torch but never run it: its children start fast and threadless.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.streams", "distill.trainer"])
    rng, killed = random.Random(3), 0
    while killed < KILLS:
        child = context.Process(target=train_peers, args=(tmp_path / "parts",))
        child.start()
        last = tmp_path / "parts" / "c" / "checkpoint.pt"
        before = last.stat().st_mtime_ns if last.exists() else None
        while child.is_alive() and (not last.exists() or last.stat().st_mtime_ns == before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.04))
        if not child.is_alive():
            break
        child.kill()
        child.join()
        killed += 1
    assert killed > KILLS // 2
    train_peers(tmp_path / "parts")
    for name in NAMES:
        assert curve(tmp_path / "parts" / name) == curve(tmp_path / "whole" / name)
        same(state_of(tmp_path / "parts" / name), state_of(tmp_path / "whole" / name))
