"""Several processes train the students of one process: the same curves and the same weights.

Sums over views are added up in another order, so float32 values agree to about seven digits. After
six steps of SGD the tests see differences of 1e-6 at most; a mistake is 1e-2 or more.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from support.ranks import run_ranks
from support.runs import curve, state_of
from support.streams import MemoryStream, train_config
from torch import distributed

from distill.methods import METHODS
from distill.trainer import train_students

SEVERAL = {"soft", "hard", "ensemble"}
METHOD = {
    "specialist": {"classes": [1, 3]},
    "ddgsd": {"mmd": 1.0},
    "dist": {"gamma": 2.0},
    "sd-kd": {"standardize": True},
}
"""Settings in which more depends on the whole batch, or that have no default."""


class DividedStream(MemoryStream):
    """The slice of this rank."""

    def __init__(self, config, **settings):
        super().__init__(config, **settings)
        rank, world = (int(os.environ.get(name, what)) for name, what in RANK)
        plan = self.facts.plan._replace(rank=rank, world=world)
        self.facts = self.facts._replace(plan=plan)


RANK = (("RANK", "0"), ("WORLD_SIZE", "1"))


def configs_of(out, method, **changes):
    """Two students with `peers`, else one, of batch norms."""
    settings = {
        "method": {"name": method, **METHOD.get(method, {})},
        "student__model": "support.streams:normed_net",
        "batch_size": 8,
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        **changes,
    }
    names = ("a", "b") if method == "peers" else ("",)
    return {
        name: train_config(Path(out, method, name), seed=seed, **settings)
        for seed, name in enumerate(names)
    }


def train_each(out, methods, changes):
    """Train by one method after the other, in one group of processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    for method in methods:
        configs = configs_of(out, method, **changes)
        first = next(iter(configs.values()))
        stream = DividedStream(first, num_teachers=2 if method in SEVERAL else 1)
        train_students(configs, stream=stream)


def assert_alike(one, other, *, within=1e-5):
    """The lines of two runs and everything in their checkpoints, up to the order of sums."""
    for line, expected in zip(curve(other), curve(one), strict=True):
        assert (line.pop("kind"), line.keys()) == (expected.pop("kind"), expected.keys())
        assert line == pytest.approx(expected, rel=within, abs=within)
    torch.testing.assert_close(state_of(other), state_of(one), rtol=within, atol=within)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process, by method."""
    out = tmp_path_factory.mktemp("alone")
    train_each(out, METHODS, {})
    return out


@pytest.fixture(scope="module", params=[2, 4])
def divided(request, tmp_path_factory):
    """Runs of several processes, by method. Of 22 views the last batch has 6, too few for 4."""
    out = tmp_path_factory.mktemp("divided")
    assert run_ranks(request.param, train_each, out, list(METHODS), {}) == [None] * request.param
    return out


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_several_processes_as_on_one(alone, divided, method):
    for name in configs_of("", method):
        assert_alike(alone / method / name, divided / method / name)


RICH = {
    "accumulate": 2,
    "ema": 0.9,
    "clip_grad_norm": 0.5,
    "schedule": {"name": "cosine", "warmup_epochs": 1},
    "label_smoothing": 0.1,
    "student__model_args": {},
    "evaluate": {"dataset": {"name": "support.toys:patches", "args": {"num_samples": 33}}},
}


@pytest.mark.parametrize(
    "changes",
    [
        RICH,
        {"amp": "bfloat16"},
        {"channels_last": True, "optimizer": {"name": "sgd", "lr": 0.05, "no_decay_bias": True}},
    ],
    ids=["everything", "bfloat16", "channels-last"],
)
def test_settings_of_a_run_hold_on_several_processes(tmp_path, changes):
    train_each(tmp_path / "one", ["kd"], changes)
    assert run_ranks(3, train_each, tmp_path / "three", ["kd"], changes) == [None] * 3
    within = 2e-2 if "amp" in changes else 1e-5  # bfloat16 has two digits
    assert_alike(tmp_path / "one" / "kd", tmp_path / "three" / "kd", within=within)


def test_evaluations_are_of_every_image_once(tmp_path):
    train_each(tmp_path / "one", ["kd"], RICH)
    run_ranks(2, train_each, tmp_path / "two", ["kd"], RICH)
    one, two = (state_of(tmp_path / name / "kd")["history"] for name in ("one", "two"))
    assert two["last"]["num_samples"] == one["last"]["num_samples"] == 33
    assert two["last"] == pytest.approx(one["last"], abs=1e-6)
