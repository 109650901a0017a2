"""Time and memory: what counts, and what does not."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from pydantic import ValidationError

from cli.experiments.demo import way
from cli.experiments.demo.settings import DemoSettings
from cli.experiments.demo.way import StepClock
from distill.events import Event

MEGABYTE = 2**20

MEASURE = """
import numpy as np, torch
from cli.experiments.demo.memory import PeakMemory

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


def test_scoring_and_saving_are_no_part_of_a_step(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 100.0, 100.5, 101.0, 101.5])
    monkeypatch.setattr(way.time, "perf_counter", lambda: next(now))
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"view_size": 7}, "greater than or equal to 8"),
        ({"padding": -1}, "greater than or equal to 0"),
        ({"teacher_epochs": 0}, "greater than or equal to 1"),
        ({"teacher_lr": 0}, "greater than 0"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"lr": 0}, "greater than 0"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"weight_decay": -1e-4}, "greater than or equal to 0"),
        ({"warmup_epochs": -1}, "greater than or equal to 0"),
        ({"threads": 0}, "greater than or equal to 1"),
        ({"quick": True}, "Extra inputs are not permitted"),
    ],
)
def test_every_bound_of_the_settings_is_enforced(change, says):
    with pytest.raises(ValidationError, match=re.escape(says)):
        DemoSettings(**change)
