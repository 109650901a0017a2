"""A worker process, seen from the server: started, told, listened to, ended."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import IO, Any

from cache_service.recording.jobs import Shard

LOG = logging.getLogger("kdcache.builds")

COMMAND = (sys.executable, "-m", "cache_service.api.builds.worker")

LAST_LINES = 20
"""Of a worker's standard error, kept to say why it ended."""

READ_S = 2.0
"""What the readers get for the rest of the pipes of a worker that has ended."""


class Worker:
    """One life of a worker.

    Attributes:
        heard: `time.monotonic` of its latest news, or of its start.
    """

    def __init__(self, config_json: str, *, command: Sequence[str] = COMMAND) -> None:
        """Start it with the job. Raises OSError where no process can be started."""
        # In a session of its own, so that Ctrl-C reaches the server alone, and so that the
        # processes which render for it end with it.
        self._process = subprocess.Popen(  # noqa: S603  the words are this program's own
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.heard = time.monotonic()
        self._news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._readers = [
            threading.Thread(target=self._take_news, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._take_lines, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self._tell(config_json)

    def front(self, shards: Sequence[Shard]) -> None:
        """Record these next."""
        self._tell(json.dumps({"front": shards}))

    def news(self) -> Iterator[dict[str, Any]]:
        """What it said since the last call."""
        with suppress(queue.Empty):
            while True:
                yield self._news.get_nowait()

    def exit_status(self) -> int | None:
        """None while it lives; negative where a signal ended it. Its news are all here then."""
        status = self._process.poll()
        if status is not None:
            for reader in self._readers:
                reader.join(READ_S)
        return status

    def last_line(self) -> str:
        """What it last wrote to standard error: the error of a traceback."""
        return self._last_lines[-1] if self._last_lines else ""

    def terminate(self) -> None:
        """Ask it to end with the shard that it is writing."""
        self._process.terminate()

    def kill(self) -> None:
        """End it and everything that it started, and close its pipes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr]
        for reader in self._readers:
            reader.join(READ_S)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which `exit_status` will say
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def _take_news(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                self.heard = time.monotonic()
                self._news.put(json.loads(line))

    def _take_lines(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                text = line.decode(errors="replace").rstrip()
                if text:
                    self._last_lines.append(text)
                    LOG.info("worker %d: %s", self._process.pid, text)
