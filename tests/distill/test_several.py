"""Several students on one stream: each as it would be alone, at one time's decoding."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from support.builds import record_toy
from support.command import kd_cache
from support.runs import curve, same, state_of, stop_at
from support.streams import MemoryStream, train_config, train_document

from cache_service.errors import ConfigError, NonFiniteError, SpecMismatchError
from cache_service.views.replay import Views
from distill import checkpoint
from distill.checkpoint import load_checkpoint
from distill.config import load_config
from distill.export import STUDENT_NAME
from distill.multi_student import split_students
from distill.targets import TargetDecoder
from distill.trainer import train, train_students

PATCHES = {"name": "support.toys:patches", "args": {"num_samples": 40}}

OWN = {
    "rich": {
        "method": {"name": "sd-kd"},
        "student": {"model": "support.streams:plain_net", "model_args": {"dropout": 0.3}},
        "ema": 0.8,
        "clip_grad_norm": 1.0,
        "schedule": {"name": "cosine", "warmup_epochs": 0.5},
        "label_smoothing": 0.1,
    },
    "normed": {
        "method": {"name": "ce"},
        "student": {"model": "support.streams:normed_net", "input_size": 12},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "seed": 5,
    },
    "half": {"amp": "float16", "channels_last": True},
}
"""Students that have nothing in common but the stream."""

PEERS = {
    "a": {"method": {"name": "peers"}, "seed": 1},
    "b": {"method": {"name": "peers", "teacher_weight": 0.5}, "seed": 2, "ema": 0.8},
    "c": {
        "method": {"name": "peers", "weight": 2, "temperature": 3},
        "student": {"model": "support.streams:plain_net", "model_args": {"dropout": 0.3}},
    },
}


def several(out, own, **changes):
    """The train files of several students."""
    listed = [{"name": name, **settings} for name, settings in own.items()]
    document = train_document(str(out), students=listed, **changes)
    return split_students(document, where="train.yaml")


def run(configs, *, stop=None, stream=None):
    first = next(iter(configs.values()))
    return train_students(configs, stream=stream or MemoryStream(first), on_event=stop_at(stop))


def alone(out, own, **changes):
    """The same student by itself."""
    config = train_config(out, **own, **changes)
    train(config, stream=MemoryStream(config))


@pytest.mark.parametrize("changes", [{}, {"accumulate": 4}], ids=["plain", "accumulated"])
def test_each_student_is_bit_for_bit_what_it_would_have_been_alone(tmp_path, changes):
    changes = changes | {"evaluate": {"dataset": PATCHES}}
    run(several(tmp_path, OWN, **changes))
    for name, own in OWN.items():
        alone(tmp_path / "alone", own, **changes)
        assert curve(tmp_path / name) == curve(tmp_path / "alone"), name
        same(state_of(tmp_path / name), state_of(tmp_path / "alone"))
        same(*(load_file(tmp_path / each / STUDENT_NAME) for each in (name, "alone")))
        shutil.rmtree(tmp_path / "alone")


def test_each_folder_is_that_of_a_run_of_one_and_goes_on_as_one(tmp_path):
    configs = several(tmp_path, OWN)
    with pytest.raises(KeyboardInterrupt):
        run(configs, stop=7)
    config = load_config(tmp_path / "rich" / "config.yaml")
    assert config == configs["rich"]
    train(config, stream=MemoryStream(config))
    alone(tmp_path / "alone", OWN["rich"])
    assert curve(tmp_path / "rich") == curve(tmp_path / "alone")


@pytest.mark.parametrize("own", [OWN, PEERS], ids=["apart", "peers"])
@pytest.mark.parametrize("step", [1, 6, 7, 12])
def test_students_that_were_stopped_go_on_to_the_same_curves(tmp_path, own, step):
    run(several(tmp_path / "whole", own))
    with pytest.raises(KeyboardInterrupt):
        run(several(tmp_path / "parts", own), stop=step)
    assert {steps_of(tmp_path / "parts" / name) for name in own} == {step}
    run(several(tmp_path / "parts", own))
    for name in own:
        assert curve(tmp_path / "parts" / name) == curve(tmp_path / "whole" / name)
        same(state_of(tmp_path / "parts" / name), state_of(tmp_path / "whole" / name))


def steps_of(out):
    return load_checkpoint(out)["history"]["step"]


class Killed(BaseException):
    """Nothing handles it, as nothing handles a kill."""


@pytest.mark.parametrize("call", range(5))
def test_a_kill_between_the_checkpoints_of_peers_leaves_them_all_at_one_step(
    tmp_path, monkeypatch, call
):
    # Three students are five writes: two beside the old ones, the one that decides, two moves.
    run(several(tmp_path / "whole", PEERS))
    configs = several(tmp_path / "parts", PEERS, checkpoint_every={"steps": 4})
    calls = Counter()

    def dying(write):
        def attempt(*arguments):
            if calls["all"] == 5 + call:  # in the second checkpoint, of step 8
                raise Killed
            calls["all"] += 1
            write(*arguments)

        return attempt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_put", dying(checkpoint._put))
        patch.setattr(checkpoint, "_promote", dying(checkpoint._promote))
        with pytest.raises(Killed):
            run(configs)
    found = checkpoint.load_checkpoints({name: config.out for name, config in configs.items()})
    steps = {payload["history"]["step"] for payload in found.values()}
    assert steps == {4 if call < 3 else 8}
    assert not list((tmp_path / "parts").rglob(checkpoint.NEXT_NAME))
    run(configs)
    for name in PEERS:
        assert curve(tmp_path / "parts" / name) == curve(tmp_path / "whole" / name)
        same(state_of(tmp_path / "parts" / name), state_of(tmp_path / "whole" / name))


def test_a_student_that_joins_later_catches_up_and_moves_nobody(tmp_path):
    run(several(tmp_path, {"half": OWN["half"]}))
    before = (tmp_path / "half" / "checkpoint.pt").read_bytes()
    results = run(several(tmp_path, OWN))
    assert {result.history.step for result in results.values()} == {12}
    assert (tmp_path / "half" / "checkpoint.pt").read_bytes() == before
    for name, own in OWN.items():
        alone(tmp_path / "alone" / name, own)
        assert curve(tmp_path / name) == curve(tmp_path / "alone" / name)
        same(state_of(tmp_path / name), state_of(tmp_path / "alone" / name))


def test_a_peer_cannot_join_or_leave_later(tmp_path):
    two = {name: PEERS[name] for name in ("a", "b")}
    run(several(tmp_path, two))
    says = r'is of a run on peers \["a", "b"\], but this run has \["a", "b", "c"\]'
    with pytest.raises(SpecMismatchError, match=says):
        run(several(tmp_path, PEERS))
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(ConfigError, match="a and b learn from each other, but one has taken 0"):
        run(several(tmp_path, two))


class Doubtful(MemoryStream):
    """Its teacher turns to NaN for those who ask at T = 2."""

    def teacher_logits(self, batch, *, temperature, cache):
        spoiled = temperature == 2 and batch.cursor.step >= 7
        return super().teacher_logits(batch, temperature=temperature, cache=cache) * (
            torch.nan if spoiled else 1
        )


def test_a_student_that_diverges_stops_all_and_is_named_and_the_others_go_on_without_it(tmp_path):
    own = {"good": {}, "bad": {"method": {"name": "kd", "temperature": 2}}}
    configs = several(tmp_path, own)
    with pytest.raises(NonFiniteError, match="the loss of student bad at step 7 is not finite"):
        run(configs, stream=Doubtful(configs["bad"]))
    assert [steps_of(tmp_path / name) for name in own] == [6, 6]
    del configs["bad"]
    run(configs, stream=Doubtful(configs["good"]))
    alone(tmp_path / "alone", {})
    same(state_of(tmp_path / "good"), state_of(tmp_path / "alone"))


def test_events_say_whose_they_are_and_a_students_own_file_need_not(tmp_path):
    events = []
    configs = several(tmp_path, {"a": {}, "b": {"seed": 1}})
    train_students(configs, stream=MemoryStream(configs["a"]), on_event=events.append)
    assert Counter(event.student for event in events if event.kind == "step") == {"a": 12, "b": 12}
    assert {event.document()["student"] for event in events} == {"a", "b"}
    assert all("student" not in line for line in curve(tmp_path / "a"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("several") / "cache")
    record_toy(url, seeds="0:1")
    return url


def test_a_batch_is_rendered_once_and_decoded_once_for_each_temperature(
    tmp_path, cache, monkeypatch
):
    own = {
        "kd": {},
        "again": {"seed": 1},
        "cells": {"method": {"name": "sd-kd", "temperature": 4}},
        "cold": {"method": {"name": "kd", "temperature": 1}},
        "labels": {"method": {"name": "ce"}},
        "peer": {"method": {"name": "peers", "temperature": 4, "teacher_weight": 1}},
    }
    sizes = {"dataset": {**PATCHES, "args": {"num_samples": 96}}, "batch_size": 20, "epochs": 1}
    configs = several(tmp_path, own, caches=cache, loader="workers", **sizes)
    calls = Counter()

    def counted(owner, name):
        original = getattr(owner, name)

        def call(self, *arguments, **named):
            calls[name, named.get("temperature")] += 1
            return original(self, *arguments, **named)

        monkeypatch.setattr(owner, name, call)

    counted(Views, "render")
    counted(TargetDecoder, "logits")
    train_students(configs)
    assert calls == {("render", None): 5, ("logits", 4): 5, ("logits", 1): 5}


def test_each_is_held_against_the_teacher_by_one_command(tmp_path, cache):
    sizes = {"dataset": {**PATCHES, "args": {"num_samples": 96}}, "batch_size": 20, "epochs": 1}
    train_students(several(tmp_path, {"a": {}, "b": {"seed": 1}}, caches=cache, **sizes))
    ended = kd_cache("evaluate", str(tmp_path), "--cache", cache, "--device", "cpu")
    assert ended.code == 0, ended.err
    first, second = ended.out.splitlines()
    assert first.startswith("a  num_samples 96  top1 ")
    assert second.startswith("b  num_samples 96  top1 ")
    assert "agreement" in first
    assert first != second.replace("b ", "a ", 1)


def test_views_to_score_on_are_rendered_once_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.evaluate.MAX_KEPT_BYTES", 0)
    configs = several(tmp_path, OWN, evaluate={"dataset": PATCHES}, epochs=1)
    rendered = []
    original = Views.render
    monkeypatch.setattr(
        Views,
        "render",
        lambda *given, **options: rendered.append(len(given[2])) or original(*given, **options),
    )
    run(configs)
    assert sum(rendered) == 40
