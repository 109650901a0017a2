"""Under torchrun, train divides its work and every command that cannot is refused in one line."""

from __future__ import annotations

import pytest
from support.command import kd_cache

from cache_service.errors import ConfigError
from cache_service.processes import launched_rank


@pytest.fixture
def launched(monkeypatch):
    """The variables of torchrun."""

    def launch(rank, world):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)

    return launch


@pytest.mark.parametrize(
    "words",
    [
        ("demo",),
        ("distill", "photos", "--teacher", "a", "--student", "b"),
        ("experiment", "FILE"),
        ("cycle", "FILE"),
        ("reproduce", "hinton-mnist"),
        ("bench", "step"),
    ],
    ids=lambda words: words[0],
)
def test_what_would_run_once_on_each_rank_is_refused(launched, words):
    launched("1", "2")
    ended = kd_cache(*words)
    assert ended.code == 2
    assert ended.err.startswith(f"rank 1: error[unsupported]: kd-cache {words[0]} was started by")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(("rank", "world"), [("0", "1"), ("5", "1"), ("", "1")])
def test_one_process_is_no_rank(launched, rank, world):
    launched(rank, world)
    assert launched_rank() == (0, 1)


@pytest.mark.parametrize(
    ("rank", "world"), [("", "2"), ("2", "2"), ("-1", "2"), ("0", "many"), ("0", "")]
)
def test_variables_that_contradict_each_other_are_refused(launched, rank, world):
    launched(rank, world)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE={world} and RANK={rank} are set"):
        launched_rank()


def test_ranks_are_those_of_the_variables(launched):
    launched("3", "4")
    assert launched_rank() == (3, 4)
