"""Run a build: in this process, in several on this machine, or on a Ray cluster.

Every engine does the same thing, `record` over a part of the shards, which may be repeated, killed
and resumed at will. So an engine is free to run a part again whenever it doubts.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from cache_service.build.config import BuildConfig
from cache_service.build.jobs import Part
from cache_service.build.opened import OpenedBuild, open_build, resolve_device
from cache_service.build.progress import OnProgress, Progress
from cache_service.build.record import open_writer, record
from cache_service.errors import KdCacheError, StorageError
from cache_service.teacher import require_trained

MAX_RESTARTS = 3
"""Deaths of one builder without a committed shard in between, after which something is wrong."""

POLL_S = 0.2
"""How often builders are looked after."""


def prepare(build: OpenedBuild, *, say: Callable[[str], None] = lambda _: None) -> None:
    """Make or extend the cache; score the teacher first where nothing is paid for yet.

    Raises:
        UntrainedTeacherError: the teacher scores like chance.
        SpecMismatchError: another cache is there.
    """
    from cache_service.storage import open_storage

    if open_storage(build.config.cache).get("zarr.json") is None:
        score = build.score()
        say(
            f"teacher: {score.accuracy:.1%} of {score.num_samples} samples right "
            f"(chance {score.chance:.1%})"
        )
        require_trained(score, build.config.teacher)
    open_writer(build)


def run_local(
    build: OpenedBuild,
    *,
    seeds: tuple[int, ...],
    part: Part = Part(),  # noqa: B008  immutable
    on_progress: OnProgress = lambda _: None,
) -> int:
    """Record a part with `config.processes` builders. Returns the shards committed.

    Raises:
        KdCacheError: whatever stopped a builder.
    """
    if build.config.processes == 1:
        return record(build, open_writer(build), seeds=seeds, part=part, on_progress=on_progress)
    count = build.config.processes
    parts = [Part(part.index + part.count * i, part.count * count) for i in range(count)]
    crew = [_Builder(build.config, seeds, each, i) for i, each in enumerate(parts)]
    try:
        while any(not builder.done for builder in crew):
            time.sleep(POLL_S)
            for builder in crew:
                builder.look_after()
            on_progress(_total([builder.progress for builder in crew if builder.progress]))
    finally:
        for builder in crew:
            builder.stop()
    return sum(builder.committed for builder in crew)


def _total(parts: list[Progress]) -> Progress:
    if not parts:
        return Progress(0, 0, 0, 0, 0, 0, 0, 0.0)
    counts = ("rows_done", "rows_total", "shards_done", "shards_total", "bytes_written")
    sums = {name: sum(getattr(part, name) for part in parts) for name in counts}
    return replace(parts[-1], **sums, rows_per_s=sum(part.rows_per_s for part in parts))


class _Builder:
    """One builder process, started again when it dies or stalls."""

    def __init__(
        self, config: BuildConfig, seeds: tuple[int, ...], part: Part, number: int
    ) -> None:
        device = resolve_device(config.device)
        if device == "cuda":
            device = f"cuda:{number % torch.cuda.device_count()}"
        self._config = config.model_copy(update={"processes": 1, "device": device})
        self._seeds = seeds
        self._part = part
        self._context = multiprocessing.get_context("forkserver")
        self._restarts = 0
        self._process: BaseProcess | None = None
        self._news: Any = None
        self.progress: Progress | None = None
        self.committed = 0
        self.done = False
        self._start()

    def look_after(self) -> None:
        """Take its news; start it again where it died or stalled.

        Raises:
            KdCacheError: it refused, or keeps dying.
        """
        if self.done:
            return
        self._listen()
        assert self._process is not None
        stalled = time.monotonic() - self._heard > self._config.stall_s
        if self._process.is_alive() and not stalled:
            return
        self._listen()
        if self.done:
            return
        self.stop()
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            what = "stalled" if stalled else "died"
            raise StorageError(
                f"builder {self._part.index} of {self._part.count} {what} "
                f"{self._restarts} times without committing a shard "
                f"(exit status {self._process.exitcode}).",
                hint="Run with `--set processes=1` to see why.",
            )
        self._start()

    def stop(self) -> None:
        """End it. What it had not committed is lost, and recorded again by whoever comes next."""
        if self._process is not None and self._process.is_alive():
            self._process.kill()
        if self._process is not None:
            self._process.join()

    def _start(self) -> None:
        self._heard = time.monotonic()
        # A queue of a killed process may be left locked, so each start gets its own.
        self._news = self._context.Queue()
        self._process = self._context.Process(
            target=_build_part, args=(self._config, self._seeds, self._part, self._news)
        )
        self._process.start()

    def _listen(self) -> None:
        while True:
            try:
                news = self._news.get_nowait()
            except queue.Empty:
                return
            self._heard = time.monotonic()
            if isinstance(news, KdCacheError):
                raise news
            if isinstance(news, Progress):
                self.progress = news
                self.committed += 1
                self._restarts = 0
            else:
                self.done = True


def _build_part(config: BuildConfig, seeds: tuple[int, ...], part: Part, news: Any) -> None:
    """What a builder process runs."""
    try:
        build = open_build(config)
        record(build, open_writer(build), seeds=seeds, part=part, on_progress=news.put)
        news.put("done")
    except KdCacheError as refusal:
        news.put(refusal)
