"""Training from real caches of the toys: parity with the live teacher, resume, refusals."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from support.builds import open_toy, record_toy, run_build
from support.streams import train_config
from support.toys import NUM_CLASSES

from cache_service.errors import ConfigError, RowsNotBuiltError, SpecMismatchError
from cache_service.format.cells import expand_cells
from distill.evaluate import evaluate_checkpoint
from distill.methods import TeacherFacts
from distill.reporting import read_metrics
from distill.stream import LiveTeacher, open_stream
from distill.trainer import train

CPU = torch.device("cpu")
MIXED = {"size": 16, "ops": [{"op": "pad_crop"}, {"op": "mixup"}, {"op": "cutmix"}]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("recorded") / "cache")
    record_toy(url, codec={"kind": "dense"})
    return url


def config_for(out, cache, **changes):
    settings = {
        "dataset": {"name": "support.toys:patches", "args": {"num_samples": 96}},
        "caches": cache,
        "student": {"model": "support.streams:normed_net"},
        "method": {"name": "sd-kd"},
        "batch_size": 20,
        "epochs": 3,
    }
    return train_config(out, **(settings | changes))


def losses(out):
    return [line["loss"] for line in read_metrics(str(out)) if line["kind"] == "step"]


def live(build):
    """The teacher of a build, beside the student."""
    teacher, spec = build.teacher, build.spec

    def answer(views_BHW3):
        stored_BSC = np.asarray(teacher.answer(views_BHW3), np.float32)
        return torch.from_numpy(expand_cells(stored_BSC, spec.scales, spec.stored_scales))

    facts = TeacherFacts(spec.scales, NUM_CLASSES, preprocess=teacher.id.preprocess)
    return LiveTeacher(facts, answer)


@pytest.mark.parametrize("name", ["soft", "hard", "ensemble"])
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_one_cache_of_another_recipe_among_several_is_refused(tmp_path, cache, name, odd):
    other = str(tmp_path / "other")
    record_toy(other, augment=MIXED)
    caches = [cache] * 3
    caches[odd] = other
    with pytest.raises(SpecMismatchError, match="recipe") as refused:
        train(config_for(tmp_path / "out", caches, method={"name": name}))
    assert caches[odd or 1] in str(refused.value)  # the first that is not as those before it
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["kd", "sd-kd"])
@pytest.mark.parametrize(
    "augment", [{"preset": "cifar", "size": 16}, MIXED], ids=["plain", "mixed"]
)
def test_a_cache_trains_as_the_live_teacher_does(tmp_path, method, augment):
    build = open_toy(str(tmp_path / "cache"), augment=augment)
    run_build(build)
    settings = {"method": {"name": method}, "optimizer": {"name": "sgd", "lr": 0.02}}
    train(config_for(tmp_path / "cached", str(tmp_path / "cache"), **settings))
    config = config_for(tmp_path / "live", [], augment=augment, seeds="0:2", **settings)
    train(config, teachers=[live(build)])
    cached, wanted = losses(tmp_path / "cached"), losses(tmp_path / "live")
    assert len(cached) == 15
    assert cached == pytest.approx(wanted, abs=1e-3)
    assert cached != wanted  # float16 rows, not the very same answers


def test_seeds_are_used_in_turn(cache):
    stream = open_stream(config_for("unused", cache), device=CPU)
    assert [batch.cursor.seed for batch in stream.batches(0)] == [0] * 5 + [1] * 5 + [0] * 5


def test_a_stopped_run_on_a_cache_goes_on_bit_for_bit(tmp_path, cache):
    train(config_for(tmp_path / "whole", cache))

    def stop(event):
        if event.kind == "step" and event.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config_for(tmp_path / "parts", cache), on_event=stop)
    train(config_for(tmp_path / "parts", cache))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_seeds_recorded_meanwhile_do_not_bend_a_run_that_resumes(tmp_path):
    url = str(tmp_path / "cache")
    run_build(open_toy(url), seeds=(0, 1))
    train(config_for(tmp_path / "whole", url, epochs=4))

    def stop(event):
        if event.kind == "step" and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(config_for(tmp_path / "parts", url, epochs=4), on_event=stop)
    run_build(open_toy(url, seeds="0:3"), seeds=(2,))
    train(config_for(tmp_path / "parts", url, epochs=4))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    with pytest.raises(SpecMismatchError, match=r"on seeds \[0, 1\], but this run has \[0, 1, 2\]"):
        train(config_for(tmp_path / "parts", url, epochs=4, seeds="0:3"))


def test_a_run_goes_on_with_a_cache_that_moved_and_refuses_another(tmp_path):
    record_toy(str(tmp_path / "cache"))
    train(config_for(tmp_path / "out", str(tmp_path / "cache")))
    (tmp_path / "cache").rename(tmp_path / "moved")
    train(config_for(tmp_path / "out", str(tmp_path / "moved")))
    record_toy(str(tmp_path / "other"), codec={"kind": "int8"})
    with pytest.raises(SpecMismatchError, match="is of a run on caches"):
        train(config_for(tmp_path / "out", str(tmp_path / "other")))


def test_another_fingerprint_than_the_one_asked_for_is_refused(tmp_path, cache):
    wanted = {"url": cache, "fingerprint": "0" * 64}
    with pytest.raises(SpecMismatchError, match=f"but {'0' * 64} was requested"):
        train(config_for(tmp_path, [wanted]))


def test_seeds_that_are_not_recorded_are_refused(tmp_path, cache):
    with pytest.raises(RowsNotBuiltError, match="seeds 5:6 were asked for"):
        train(config_for(tmp_path, cache, seeds="5"))


def test_another_dataset_is_refused(tmp_path, cache):
    other = {"name": "support.toys:patches", "args": {"num_samples": 96, "salt": 9}}
    with pytest.raises(SpecMismatchError, match="was recorded from dataset"):
        train(config_for(tmp_path, cache, dataset=other))


def test_labels_alone_need_no_cache(tmp_path):
    config = config_for(
        tmp_path, [], augment={"preset": "cifar", "size": 16}, method={"name": "ce"}
    )
    stream = open_stream(config, device=CPU)
    assert [batch.cursor.seed for batch in stream.batches(0)] == [0] * 5 + [1] * 5 + [2] * 5
    assert train(config).history.step == 15


def test_soft_targets_without_a_teacher_are_refused_before_training(tmp_path):
    config = config_for(
        tmp_path, [], augment={"preset": "cifar", "size": 16}, method={"name": "kd"}
    )
    with pytest.raises(ConfigError, match="learns from a teacher, but `caches` is empty"):
        train(config)


def test_a_checkpoint_is_held_against_its_teacher_on_recorded_views(tmp_path, cache):
    train(config_for(tmp_path, cache))
    found = evaluate_checkpoint(tmp_path, cache=cache, seed=1, device="cpu")
    assert found.num_samples == 96
    assert 0 <= found.agreement <= 1
    first = evaluate_checkpoint(tmp_path, cache=cache, device="cpu")
    assert first == evaluate_checkpoint(tmp_path, cache=cache, seed=0, device="cpu")
    assert first.nll != found.nll
