"""Time and memory: what counts, and what does not."""

from __future__ import annotations

import subprocess
import sys

from cli.experiments import measure
from cli.experiments.measure import StepClock
from distill.reporting import Event

MEGABYTE = 2**20

MEASURE = """
import numpy as np, torch
from cli.experiments.measure import PeakMemory

def hold(megabytes):
    return int(np.ones(megabytes * 2**20, np.uint8)[-1])

hold({before})
peak = PeakMemory(torch.device("cpu"))
print(peak.above_start())
hold(64)
print(peak.above_start())
"""


def measured(before: int) -> list[int]:
    """Peaks at the start and after 64 MB, in a process whose allocator has nothing to reuse."""
    script = MEASURE.format(before=before)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return [int(line) for line in done.stdout.split()]


def test_what_was_held_and_given_back_meanwhile_counts():
    _, after = measured(before=1)
    assert 60 * MEGABYTE < after < 90 * MEGABYTE


def test_what_was_held_and_given_back_before_neither_counts_nor_hides_what_comes_after():
    start, after = measured(before=128)
    assert start < 8 * MEGABYTE
    assert 60 * MEGABYTE < after < 90 * MEGABYTE


def event(kind, epoch=1, **values):
    return Event(kind, epoch, 0, values)


def test_evaluating_and_saving_are_not_part_of_a_step(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 100.0, 100.5, 101.0, 101.5])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    told = []
    clock = StepClock(lambda epoch, accuracy: told.append((epoch, accuracy)))
    for each in [
        event("step"),
        event("step"),
        event("step"),
        event("evaluation", eval_top1=0.25),
        event("checkpoint"),
        event("step"),
        event("step"),
    ]:
        clock(each)
    assert clock.seconds == [1.0, 2.0, 0.5]
    assert clock.curve == [0.25]
    assert told == [(1, 0.25)]
