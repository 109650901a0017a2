"""How often a builder process is started again: as long as it gets on."""

from __future__ import annotations

import queue
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.builds import build_document

from cache_service.errors import StorageError
from cache_service.recording import crew
from cache_service.recording.config import BuildConfig
from cache_service.recording.jobs import WHOLE
from cache_service.recording.progress import Progress


@dataclass
class Mortals:
    """A multiprocessing context whose processes tell of `done` shards, one entry a life, and die.

    `committed` is what each life tells of its own commits.
    """

    done: list[int]
    committed: int = 0
    lives: int = 0
    exitcode: int = field(default=-9, init=False)
    Queue = staticmethod(queue.Queue)

    def set_forkserver_preload(self, _: list[str]) -> None: ...

    def Process(self, *, target: Any, args: tuple[Any, ...]) -> Mortals:
        del target
        self._news = args[-1]
        return self

    def start(self) -> None:
        done = self.done[self.lives]
        self.lives += 1
        self._news.put(Progress(0, 0, 0, 0, done, 20, self.committed, 0, 1.0))

    def is_alive(self) -> bool:
        return False

    def kill(self) -> None: ...

    def join(self) -> None: ...


def _lives(monkeypatch, tmp_path, mortals):
    """Look after a builder until it is given up."""
    monkeypatch.setattr(crew.multiprocessing, "get_context", lambda _: mortals)
    config = BuildConfig.model_validate(build_document(str(tmp_path / "c")))
    builder = crew.Builder(config, (0,), WHOLE, number=0)
    with pytest.raises(StorageError, match="without committing a shard"):
        _look_after_until_given_up(builder, mortals)
    return mortals.lives


def _look_after_until_given_up(builder, mortals):
    while mortals.lives < len(mortals.done):
        builder.look_after()


def test_a_builder_that_gets_no_shard_done_in_four_lives_is_given_up(monkeypatch, tmp_path):
    assert _lives(monkeypatch, tmp_path, Mortals([3] * 20)) == crew.MAX_RESTARTS + 1


def test_commits_that_only_the_next_life_tells_of_keep_a_builder_going(monkeypatch, tmp_path):
    mortals = Mortals([*range(9), *[9] * 20])
    assert _lives(monkeypatch, tmp_path, mortals) == 9 + crew.MAX_RESTARTS + 1
