"""One builder process: started, listened to, and started again when it dies or stalls."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import time
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from cache_service.errors import KdCacheError, StorageError
from cache_service.recording.config import BuildConfig
from cache_service.recording.jobs import Part
from cache_service.recording.opened import open_build, resolve_device
from cache_service.recording.progress import Progress
from cache_service.recording.record import open_writer, record

MAX_RESTARTS = 3
"""Deaths of one builder without a committed shard in between, after which something is wrong."""

START_S = 600.0
"""What a builder gets for loading dataset and teacher before its first batch."""

PATIENCE_S = 20.0
"""What a builder that is told to end gets for finishing the shard it is writing."""

_DONE = "done"


class Builder:
    """One part of a build in a process of its own.

    Attributes:
        progress: its latest news.
        committed: shards that it committed, over all its lives.
        done: its part is recorded.
    """

    def __init__(
        self, config: BuildConfig, seeds: tuple[int, ...], part: Part, *, number: int
    ) -> None:
        device = resolve_device(config.device)
        if device == "cuda":
            device = f"cuda:{number % torch.cuda.device_count()}"
        self._config = config.model_copy(update={"processes": 1, "device": device})
        self._seeds = seeds
        self._part = part
        self._context = multiprocessing.get_context("forkserver")
        self._restarts = 0
        self._shards_done = 0
        self.progress: Progress | None = None
        self.committed = 0
        self.done = False
        # Imported once by the server, instead of for each life of each builder.
        self._context.set_forkserver_preload([__name__])
        self._start()

    def look_after(self) -> None:
        """Take its news; start it again where it died or stalled.

        Raises:
            KdCacheError: it refused, or keeps dying.
        """
        alive = self._process.is_alive()
        self._listen()
        patience = START_S if self.progress is None else self._config.stall_s
        stalled = time.monotonic() - self._heard > patience
        if self.done or (alive and not stalled):
            return
        self._process.kill()
        self._process.join()
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            raise StorageError(
                f"builder {self._part.index} of {self._part.count} "
                f"{'stalled' if stalled else 'died'} {self._restarts} times without committing a "
                f"shard (exit status {self._process.exitcode}).",
                hint="Run with `--set processes=1` to see why.",
            )
        self._start()

    def stop(self) -> None:
        """Tell it to end, then make it. What it had not committed is recorded by the next run."""
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(PATIENCE_S)
            self._process.kill()
        self._process.join()

    def _start(self) -> None:
        self._heard = time.monotonic()
        self._committed_before = self.committed
        self.progress = None
        # A queue of a killed process may be left locked, so each life gets its own.
        self._news: Any = self._context.Queue()
        self._process: BaseProcess = self._context.Process(
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
                # Not `shards_committed`: death may outrun the news of a commit, and then the next
                # life finds it done.
                if news.shards_done > self._shards_done:
                    self._restarts, self._shards_done = 0, news.shards_done
                self.committed = self._committed_before + news.shards_committed
                self.progress = news
            elif news == _DONE:
                self.done = True


def _build_part(config: BuildConfig, seeds: tuple[int, ...], part: Part, news: Any) -> None:
    """What a builder process runs."""
    # Ctrl-C reaches every process of a terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        build = open_build(config)
        record(build, open_writer(build), seeds=seeds, part=part, on_progress=news.put)
        news.put(_DONE)
    except KdCacheError as refusal:
        news.put(refusal)
    except KeyboardInterrupt:  # SIGTERM from the parent, once the shard being written is committed
        return
