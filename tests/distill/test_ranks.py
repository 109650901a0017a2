"""Several processes train the students of one process: the same curves and the same weights.

Sums over views are added up in another order, so float32 values agree to about seven digits. After
six steps of SGD the tests see differences of 1e-6 at most; a mistake is 1e-2 or more.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from support.builds import record_toy
from support.origin import serving
from support.ranks import Started, run_ranks
from support.runs import curve, state_of
from support.streams import MemoryStream, train_config
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from cache_service.errors import (
    ConfigError,
    KdCacheError,
    NonFiniteError,
    UnsupportedError,
    WorkersError,
)
from cache_service.storage.local import LocalStorage
from distill.methods import METHODS
from distill.ranks import StoppedTogether, join_ranks, own_device
from distill.trainer import train, train_students

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
HALF = {"amp": "float16", "optimizer": {"name": "sgd", "lr": 0.01}}
"""The first scale of float16 gradients overflows: the ranks skip the same updates."""


@pytest.mark.parametrize(
    "changes",
    [
        RICH,
        {"amp": "bfloat16"},
        HALF,
        {"channels_last": True, "optimizer": {"name": "sgd", "lr": 0.05, "no_decay_bias": True}},
        {"batch_size": 7},  # some slices have one view
    ],
    ids=["everything", "bfloat16", "float16", "channels-last", "odd"],
)
def test_settings_of_a_run_hold_on_several_processes(tmp_path, changes):
    train_each(tmp_path / "one", ["kd"], changes)
    assert run_ranks(3, train_each, tmp_path / "three", ["kd"], changes) == [None] * 3
    within = 2e-2 if "amp" in changes else 1e-5  # bfloat16 has two digits, float16 has three
    assert_alike(tmp_path / "one" / "kd", tmp_path / "three" / "kd", within=within)


def test_evaluations_are_of_every_image_once(tmp_path):
    train_each(tmp_path / "one", ["kd"], RICH)
    run_ranks(2, train_each, tmp_path / "two", ["kd"], RICH)
    one, two = (state_of(tmp_path / name / "kd")["history"] for name in ("one", "two"))
    assert two["last"]["num_samples"] == one["last"]["num_samples"] == 33
    assert two["last"] == pytest.approx(one["last"], abs=1e-6)


class CheckpointedNet(nn.Module):
    """Two parts that are computed again in the backward pass; one ends in its batch norm."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Linear(8, num_classes)

    def forward(self, images_B3HW):
        for part in (self.conv, self.head):
            images_B3HW = checkpoint(part, images_B3HW, use_reentrant=False)
        return self.last(images_B3HW.mean(dim=(2, 3)))


def checkpointed_net(num_classes):
    return CheckpointedNet(num_classes)


def test_activation_checkpointing_sees_the_batch_norms_of_all_ranks(tmp_path):
    changes = {"student__model": f"{__file__}:checkpointed_net"}
    train_each(tmp_path / "one", ["kd"], changes)
    assert run_ranks(2, train_each, tmp_path / "two", ["kd"], changes) == [None] * 2
    assert_alike(tmp_path / "one" / "kd", tmp_path / "two" / "kd")


def train_twice(out):
    """Two runs in processes that no calling program has joined."""
    for name in ("first", "second"):
        configs = configs_of(out / name, "kd")
        train_students(configs, stream=DividedStream(configs[""]))
        assert not distributed.is_initialized()


def test_processes_may_train_again_after_a_run(tmp_path):
    assert run_ranks(3, train_twice, tmp_path / "three") == [None] * 3
    train_twice(tmp_path / "one")
    for name in ("first", "second"):
        assert_alike(tmp_path / "one" / name / "kd", tmp_path / "three" / name / "kd")


def groups_left(out):
    """Process groups before and after two runs in a calling program's group, of which one fails."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    before = len(distributed.distributed_c10d._world.pg_map)
    train_over(out, {}, {}, DividedStream)
    with suppress(KdCacheError):
        join_on_a_mixture()
    return before, len(distributed.distributed_c10d._world.pg_map)


def test_a_run_leaves_no_groups_of_processes_behind(tmp_path):
    for before, after in run_ranks(2, groups_left, tmp_path):
        assert before == after == 1


def train_without(out, variable, value):
    os.environ[variable] = value
    train_over(out, {}, {}, DividedStream)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MASTER_ADDR", ""),
        ("MASTER_PORT", ""),
        ("MASTER_PORT", "x"),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "65536"),
    ],
)
def test_processes_that_are_not_told_where_they_find_each_other_are_refused(
    tmp_path, variable, value
):
    for refusal in run_ranks(2, train_without, tmp_path, variable, value):
        assert isinstance(refusal, ConfigError)
        assert f"{variable}={value} " in str(refusal)
        assert "unset WORLD_SIZE to train by one process" in refusal.hint


class Watched(DividedStream):
    """Does something before the batch of a step is read."""

    def __init__(self, config, before):
        super().__init__(config)
        self._before = before

    def batches(self, first_step):
        for batch in super().batches(first_step):
            self._before(batch.cursor.step)
            yield batch


def train_watched(out, before, on_event=None, **changes):
    configs = configs_of(out, "kd", **changes)
    train_students(configs, stream=Watched(configs[""], before), on_event=on_event)


def rank():
    return int(os.environ.get("RANK", "0"))


MANY = {"epochs": 6, "checkpoint_every": {"steps": 1}, "ema": 0.9}
"""18 steps."""


def pause_at(step, folder):
    """Wait for ever before a step, and leave a file that says so."""

    def before(now):
        if now == step:
            (folder / f"paused{rank()}").touch()
            time.sleep(1000)

    return before


def train_until(out, step):
    train_watched(out, pause_at(step, out.parent), **MANY)


def go_on(out):
    train_watched(out, lambda _: None, **MANY)


def wait_for(*paths):
    end = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_run_of_two_that_is_killed_goes_on_as_one_three_or_four(tmp_path):
    go_on(tmp_path / "whole")
    started = Started(2, train_until, tmp_path / "killed", 8)
    wait_for(tmp_path / "paused0", tmp_path / "paused1")
    started.kill()
    assert state_of(tmp_path / "killed" / "kd")["history"]["step"] == 8
    for world in (1, 3, 4):
        shutil.copytree(tmp_path / "killed", tmp_path / f"on{world}")
        assert run_ranks(world, go_on, tmp_path / f"on{world}") == [None] * world
        # 18 steps: differences of sums grow with each of them.
        assert_alike(tmp_path / "whole" / "kd", tmp_path / f"on{world}" / "kd", within=1e-4)


def stop_one(out, which, at):
    """One rank gets a signal at some step, and the others do not."""

    def before(step):
        if rank() == which and step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    train_watched(out, before, **MANY | {"checkpoint_every": {"epochs": 100}})


@pytest.mark.parametrize("which", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path, which):
    ended = run_ranks(2, stop_one, tmp_path / "parts", which, 7)
    assert [type(each) for each in ended] == [StoppedTogether] * 2
    # The signal came before the eighth step, which all of them finished.
    assert state_of(tmp_path / "parts" / "kd")["history"]["step"] == 8
    go_on(tmp_path / "whole")
    run_ranks(2, stop_one, tmp_path / "parts", None, None)
    assert_alike(tmp_path / "whole" / "kd", tmp_path / "parts" / "kd", within=1e-4)


def spoil(out, which):
    class Spoiled(DividedStream):
        def teacher_logits(self, batch, **options):
            logits = super().teacher_logits(batch, **options).clone()
            if rank() == which and batch.cursor.step == 4:
                logits[0] = torch.nan
            return logits

    configs = configs_of(out, "kd", checkpoint_every={"steps": 4}, epochs=4)
    train_students(configs, stream=Spoiled(configs[""]))


@pytest.mark.parametrize("which", [0, 1])
def test_a_bad_loss_on_one_rank_stops_all_and_is_never_saved(tmp_path, which):
    ended = run_ranks(2, spoil, tmp_path, which)
    assert all(isinstance(each, NonFiniteError) for each in ended)
    assert "the loss of step 4 is not finite (loss=nan" in str(ended[which])
    other = "the loss of step 4 is not finite on another process, which names the samples."
    assert other in str(ended[1 - which])
    assert state_of(tmp_path / "kd")["history"]["step"] == 4


def die_at(out, which, at):
    def before(step):
        if rank() == which and step == at:
            os.kill(os.getpid(), signal.SIGKILL)

    train_watched(out, before, **MANY)


@pytest.mark.parametrize("which", [0, 1])
def test_the_death_of_one_rank_ends_the_others_at_once(tmp_path, which):
    began = time.monotonic()
    started = Started(2, die_at, tmp_path, which, 5)
    other, answer = started.one_answer()
    assert other == 1 - which
    assert isinstance(answer, WorkersError)
    assert "another process of this run ended or cannot be reached" in str(answer)
    assert started.codes()[which] == -signal.SIGKILL
    assert time.monotonic() - began < 60


def train_over(out, changes, others, stream):
    """A run in which the other ranks have `others` changed, too."""
    configs = configs_of(out, "kd", **changes | (others if rank() else {}))
    train_students(configs, stream=stream(configs[""]))


class Elsewhere(DividedStream):
    """Other rows on each rank."""

    def __init__(self, config):
        super().__init__(config)
        identity = {**self.facts.identity, "caches": [f"{rank()}"]}
        self.facts = self.facts._replace(identity=identity)


@pytest.mark.parametrize(
    ("changes", "stream", "says"),
    [
        ({"batch_size": 3}, DividedStream, "batch_size=3 is the number of views for all 2"),
        ({"compile": True}, DividedStream, "compile: true is not possible on 2 processes"),
        ({"device": "cuda:1"}, DividedStream, "device: cuda:1 was requested for each of 2"),
        ({}, MemoryStream, "the stream is of rank 0 of 1, but this process is rank"),
    ],
    ids=["batch", "compile", "device", "stream"],
)
def test_what_several_processes_cannot_train_is_refused(tmp_path, changes, stream, says):
    refusals = run_ranks(2, train_over, tmp_path / "out", changes, {}, stream)
    kinds = {type(refusal) for refusal in refusals}
    assert kinds <= {ConfigError, UnsupportedError, WorkersError}
    said = [refusal for refusal in refusals if not isinstance(refusal, WorkersError)]
    assert all(says in refusal.message and refusal.hint for refusal in said)
    assert said
    assert not (tmp_path / "out" / "kd").exists()


@pytest.mark.parametrize(
    ("others", "stream", "says"),
    [
        ({"epochs": 9}, DividedStream, "rank 1 has other settings than rank 0: epochs is 9 here"),
        ({}, Elsewhere, "rank 1 reads other data than rank 0: caches is ['1'] here and ['0']"),
    ],
    ids=["settings", "data"],
)
def test_ranks_that_would_not_train_the_same_are_refused(tmp_path, others, stream, says):
    first, second = run_ranks(2, train_over, tmp_path / "out", {}, others, stream)
    assert says in str(second)
    assert isinstance(first, WorkersError)


def test_a_folder_that_another_run_writes_into_is_refused_on_every_rank(tmp_path):
    out = tmp_path / "kd"
    storage = LocalStorage(str(out))
    assert storage.begin("run")
    for refusal in run_ranks(2, train_over, tmp_path, {}, {}, DividedStream):
        assert "another run is writing into" in str(refusal)
    storage.end("run")
    assert run_ranks(2, train_over, tmp_path, {}, {}, DividedStream) == [None] * 2


def test_other_ranks_write_nothing_and_need_no_folder(tmp_path):
    """As on machines that do not share `out`: rank 0 tells the others where the run is."""
    work = (train_elsewhere, tmp_path)
    assert run_ranks(2, *work, 1) == [None] * 2
    assert run_ranks(2, *work, 2) == [None] * 2
    assert state_of(tmp_path / "rank0" / "ps-kd")["history"]["step"] == 6
    assert not (tmp_path / "rank1").exists()


def train_elsewhere(folder, epochs):
    class Short(DividedStream):
        """Ends after some epochs, as if the run was killed."""

        def batches(self, first_step):
            last = epochs * self.facts.plan.steps_per_epoch
            return (batch for batch in super().batches(first_step) if batch.cursor.step < last)

    configs = configs_of(folder / f"rank{rank()}", "ps-kd")
    train_students(configs, stream=Short(configs[""]))


class Drawing(DividedStream):
    """Draws a random number where the student's dropout does."""

    def __init__(self, config):
        super().__init__(config)
        self.drawn = []

    def teacher_logits(self, batch, **options):
        self.drawn.append(torch.rand(()).item())
        return super().teacher_logits(batch, **options)


def draw(out):
    configs = configs_of(out, "kd", epochs=1)
    stream = Drawing(configs[""])
    train_students(configs, stream=stream)
    return stream.drawn


def test_each_rank_draws_numbers_of_its_own_and_the_first_those_of_one_process(tmp_path):
    alone, ranks = draw(tmp_path / "one"), run_ranks(4, draw, tmp_path / "four")
    assert ranks[0] == alone
    first, second, last = zip(*ranks, strict=True)
    assert len({*first, *second}) == 8
    assert set(last) == {alone[-1]}  # six views are too few to divide: all ranks do the same


@pytest.mark.parametrize(
    ("name", "has_gpu", "expected"),
    [
        ("auto", True, "cuda:3"),
        ("cuda", True, "cuda:3"),
        ("auto", False, "auto"),
        ("cpu", True, "cpu"),
    ],
)
def test_each_rank_has_the_gpu_of_its_place_on_its_machine(monkeypatch, name, has_gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4 * has_gpu)
    for variable, value in {"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16"}.items():
        monkeypatch.setenv(variable, value)
    assert own_device(name) == expected


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for variable, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(
        ConfigError, match=r"process 3 of this machine, .* 2 GPUs .*--nproc-per-node 2"
    ):
        own_device("auto")


def join_on_a_mixture():
    with join_ranks(torch.device("cuda" if rank() else "cpu")):
        pass


def test_a_gpu_and_a_cpu_do_not_train_together():
    for refusal in run_ranks(2, join_on_a_mixture):
        assert isinstance(refusal, ConfigError)
        assert "some of the 2 processes train on a GPU and others on a CPU" in str(refusal)


MIXED = {"size": 16, "ops": [{"op": "pad_crop"}, {"op": "mixup"}, {"op": "cutmix"}]}
TOYS = {"name": "support.toys:patches", "args": {"num_samples": 96}}


def train_recorded(out, cache, loader):
    """Three epochs of two seeds, in a process group that the run makes for itself."""
    config = train_config(
        out,
        dataset=TOYS,
        caches=[cache],
        loader=loader,
        student={"model": "support.streams:normed_net"},
        optimizer={"name": "sgd", "lr": 0.02},
        batch_size=20,
        epochs=3,
    )
    train(config)


def test_mixed_views_are_those_of_the_record_from_a_folder_and_over_http(tmp_path):
    record_toy(str(tmp_path / "c"), dataset=TOYS, augment=MIXED)
    train_recorded(tmp_path / "one", str(tmp_path / "c"), "workers")
    with serving(tmp_path) as origin:
        served = {"url": origin.url("c"), "disk_cache": str(tmp_path / "disk")}
        folder = str(tmp_path / "c")
        for name, cache, loader in (
            ("here", folder, "auto"),
            ("device", folder, "device"),
            ("there", served, "auto"),
        ):
            assert run_ranks(2, train_recorded, tmp_path / name, cache, loader) == [None] * 2
            assert_alike(tmp_path / "one", tmp_path / name)
