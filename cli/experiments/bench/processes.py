"""The processes of a measurement: servers that announce a port, and the client that loads them."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from cache_service.errors import KdCacheError

STOP_SECONDS = 10.0

KD_CACHE = (sys.executable, "-c", "from cli.main import run; run()")
"""This installation's own command."""


class Memory(NamedTuple):
    """Of a process, in bytes: what it holds, and of that what is no mapped file."""

    resident: int
    anonymous: int


class Server(NamedTuple):
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int

    def memory(self) -> Memory:
        """Its memory now."""
        fields = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        )
        return Memory(*(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon")))


@contextlib.contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[Server]:
    """A server that says `{"url": ...}` on stdout when it takes connections; stopped at the end.

    Raises:
        KdCacheError: it does not say so.
    """
    with log.open("wb") as errors:
        process = subprocess.Popen(  # noqa: S603 - our own commands
            command, stderr=errors, stdout=subprocess.PIPE
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise KdCacheError(f"{' '.join(command)} did not start: {log.read_text()[-500:]}")
        yield Server(process, int(json.loads(line)["url"].rpartition(":")[2]))
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class Load:
    """The client: one process for all measurements. A context: at its end it is gone."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cli.experiments.bench.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def measure(
        self, port: int, requests: Sequence[bytes], *, concurrency: int, count: int
    ) -> dict[str, Any]:
        """Seconds, latencies and bytes of `count` answers.

        Raises:
            KdCacheError: the server gave another answer than 200.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {
            "port": port,
            "requests": [base64.b64encode(each).decode() for each in requests],
            "concurrency": concurrency,
            "count": count,
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise KdCacheError("the load client ended: its message stands above.")
        measured: dict[str, Any] = json.loads(line)
        return measured
