"""The worker process of one build: `python -m cache_service.api.builds.worker`.

Standard input brings the job, one JSON line, and then shards to record next; its end means that the
server is gone. Standard output takes news, one JSON document a line. SIGTERM finishes the shard
being written. This is the only file of the queue that loads torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from cache_service.api.builds.states import BuildError
from cache_service.errors import ConfigError, KdCacheError
from cache_service.recording.config import BuildConfig
from cache_service.recording.jobs import Shard
from cache_service.recording.order import ShardOrder
from cache_service.recording.progress import Progress

NEWS_S = 0.2
"""Least time between two reports, but for those of a committed shard."""

LAST_WORDS_S = 20.0
"""What an orphan gets for the shard that it is writing."""

INTERRUPTED = 130

Say = Callable[[dict[str, Any]], None]


def main() -> int:
    """Record what standard input asks for. Returns the exit status."""
    say = _take_standard_output()
    lines = os.fdopen(os.dup(0), "rb", buffering=0)  # a buffer has a lock, which an exit may meet
    config = BuildConfig.model_validate_json(lines.readline())
    order = ShardOrder()
    threading.Thread(target=_listen, args=(lines, order), daemon=True).start()
    try:
        _record(config, order, say)
    except KdCacheError as refusal:
        say({"error": BuildError.of(refusal).model_dump()})
        return refusal.exit_code
    except KeyboardInterrupt:  # SIGTERM, once the shard being written is committed
        return INTERRUPTED
    say({"done": True})
    return 0


def _record(config: BuildConfig, order: ShardOrder, say: Say) -> None:
    try:
        from cache_service.recording.engine import prepare
        from cache_service.recording.opened import open_build
        from cache_service.recording.record import open_writer, record
    except ImportError as missing:
        raise ConfigError(
            f"this server cannot run builds: {missing}.", hint="pip install 'kd-cache[train]'"
        ) from missing
    build = open_build(config)
    prepare(build)
    record(
        build,
        open_writer(build),
        seeds=config.seeds,
        on_progress=_Reporter(say),
        order=order,
    )


class _Reporter:
    def __init__(self, say: Say) -> None:
        self._say = say
        self._said = 0.0
        self._committed = -1

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.shards_committed == self._committed and now - self._said < NEWS_S:
            return
        self._said, self._committed = now, progress.shards_committed
        told = asdict(progress) | {"eta_s": progress.eta_s}
        del told["seed"], told["shard"]
        self._say({"progress": told})


def _take_standard_output() -> Say:
    """Keep standard output for news: what libraries print goes to standard error."""
    news = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(document: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # the server is gone; `_listen` knows it, too
            news.write(json.dumps(document) + "\n")

    return say


def _listen(lines: Any, order: ShardOrder) -> None:
    for line in iter(lines.readline, b""):
        for seed, shard in json.loads(line)["front"]:
            order.front(Shard(seed, shard))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_WORDS_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
