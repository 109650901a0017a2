"""Two runs never write into one `out` folder at a time, however the first one ends."""

from __future__ import annotations

import multiprocessing

import pytest
from support.runs import curve, same, state_of
from support.streams import MemoryStream, train_config

from cache_service.errors import ConfigError
from distill.trainer import train, train_students

TIMEOUT_S = 120.0


def settings(out, **changes):
    return train_config(out, checkpoint_every={"steps": 1}, **changes)


def train_and_pause(out, reached, proceed):
    """Trains, and stops at the third line of metrics until `proceed` is set."""
    seen = []

    def pause(event):
        seen.append(event)
        if len(seen) == 3:
            reached.set()
            proceed.wait(TIMEOUT_S)

    config = settings(out)
    train(config, stream=MemoryStream(config), on_event=pause)


@pytest.fixture
def paused(tmp_path):
    """A process that trains into `run` and is paused, and the event that lets it proceed."""
    context = multiprocessing.get_context("forkserver")
    reached, proceed = context.Event(), context.Event()
    child = context.Process(target=train_and_pause, args=(tmp_path / "run", reached, proceed))
    child.start()
    try:
        assert reached.wait(TIMEOUT_S)
        yield child, proceed
    finally:
        child.kill()
        child.join()


@pytest.fixture
def whole(tmp_path):
    config = settings(tmp_path / "whole")
    train(config, stream=MemoryStream(config))
    return tmp_path / "whole"


def test_a_second_run_is_refused_and_the_first_is_unharmed(paused, whole, tmp_path):
    child, proceed = paused
    other = settings(tmp_path / "run", seed=1)
    says = r"another run is writing into \S+/run, .*--set out=FOLDER"
    with pytest.raises(ConfigError, match=says) as refused:
        train(other, stream=MemoryStream(other))
    assert "\n" not in str(refused.value)
    proceed.set()
    child.join(TIMEOUT_S)
    assert child.exitcode == 0
    assert curve(tmp_path / "run") == curve(whole)
    same(state_of(tmp_path / "run"), state_of(whole))
    assert not (tmp_path / "run" / ".scratch").exists()


def test_a_run_that_was_killed_blocks_nobody_and_is_resumed(paused, whole, tmp_path):
    child, _ = paused
    child.kill()
    child.join()
    config = settings(tmp_path / "run")
    train(config, stream=MemoryStream(config))
    assert curve(tmp_path / "run") == curve(whole)
    same(state_of(tmp_path / "run"), state_of(whole))


def test_each_of_several_students_reserves_its_folder(paused, tmp_path):
    configs = {"a": settings(tmp_path / "a"), "b": settings(tmp_path / "run", seed=1)}
    with pytest.raises(ConfigError, match=r"another run is writing into \S+/run"):
        train_students(configs, stream=MemoryStream(configs["a"]))
    assert not (tmp_path / "a").exists()
    train(configs["a"], stream=MemoryStream(configs["a"]))
