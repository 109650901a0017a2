"""Child processes: start them, exchange messages, replace those that fail, and stop them.

A child is a Python program with one job: it records shards, renders pictures or trains a student.
Messages in both directions are JSON objects, one a line: the parent writes to the child's standard
input and the child writes to its standard output. The end of the standard input tells the child
that its parent is gone. This module holds both ends of that protocol: `ChildProcess` for the parent
and `ParentConnection` for the child. `Supervisor` adds the rules for restarts.
"""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import cache_service
from cache_service.errors import ConfigError

Message = dict[str, Any]

MAX_RESTARTS = 3
"""Restarts without progress in between, after which a child is not started again."""

START_S = 600.0
"""Time for the first message of a child, which may have to load a dataset and a teacher first."""

MAX_MESSAGE_BYTES = 16 << 20
"""A child that sends a longer line is killed: its output is not this protocol."""

NUM_LAST_LINES = 20
"""Lines of a child's standard error that are kept, to say why it ended."""

READ_S = 2.0
"""Time for reading what is left in the pipes of a child that has ended."""

INTERRUPTED = 130
"""Exit status of a child that was asked to stop, and did."""


def launched_rank() -> tuple[int, int]:
    """The rank of this process and their number, as torchrun tells its processes; else 0 of 1.

    Raises:
        ConfigError: the variables contradict each other.
    """
    world, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "")
    if world == "1":
        return 0, 1
    if not (world.isdecimal() and rank.isdecimal() and int(rank) < int(world)):
        raise ConfigError(
            f"WORLD_SIZE={world} and RANK={rank} are set: each of several processes has a RANK "
            "from 0 to WORLD_SIZE - 1.",
            hint="torchrun sets both; unset WORLD_SIZE to train by one process.",
        )
    return int(rank), int(world)


def module_command(module: str) -> tuple[str, ...]:
    """The command that runs a module of this package in a new interpreter."""
    # -P keeps the current folder off the import path: it may hold a folder named like a package.
    return (sys.executable, "-P", "-m", module)


class ChildProcess:
    """One child process, seen from its parent. Methods may be called from any thread.

    Attributes:
        pid: of the process.
        last_message_s: `time.monotonic()` of its latest message, or of its start.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        first_message: Message | None = None,
        environment: Mapping[str, str] | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        """Start the process.

        Args:
            command: from `module_command`.
            first_message: sent at once.
            environment: variables that the child gets in addition to those of this process.
            log: where the child's standard error goes, line by line. It is this process's own
                standard error if absent.

        Raises:
            OSError: the process cannot be started.
        """
        # A new session: Ctrl-C in a terminal reaches the parent only, which decides what to do, and
        # `kill` also ends the processes that the child has started.
        self._process = subprocess.Popen(  # noqa: S603  commands are made by this program
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if log is None else subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": _import_path()} | dict(environment or {}),
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input = self._process.stdin
        self.pid = self._process.pid
        self.last_message_s = time.monotonic()
        self._is_terminated = False
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._readers = [self._reader(self._read_messages, self._process.stdout)]
        if log is not None:
            assert self._process.stderr is not None
            self._readers.append(self._reader(self._read_log, self._process.stderr, log))
        if first_message is not None:
            self.send(first_message)

    def send(self, message: Message) -> None:
        """Send a message. A child that has ended does not get it; `exit_status` tells so."""
        with suppress(OSError, ValueError):  # the pipe is broken, or closed by this side
            self._input.write(json.dumps(message).encode() + b"\n")
            self._input.flush()

    def close_input(self) -> None:
        """Tell the child that no more messages will come."""
        with suppress(OSError):
            self._input.close()

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message, or None when the child has closed its output.

        Raises:
            TimeoutError: no message came in time.
        """
        try:
            message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            self._messages.put(None)  # for the next call
        return message

    def messages(self) -> Iterator[Message]:
        """The messages that have come since the last call. Does not wait."""
        with suppress(TimeoutError):
            while (message := self.receive(timeout_s=0)) is not None:
                yield message

    def exit_status(self) -> int | None:
        """None while the child runs; negative if a signal ended it.

        Once this is not None, every message of the child has been received.
        """
        status = self._process.poll()
        if status is not None:
            self._join_readers()
        return status

    def last_line(self) -> str:
        """The last line of its standard error, such as the error below a traceback."""
        return self._last_lines[-1] if self._last_lines else ""

    def terminate(self) -> None:
        """Ask the child to finish its current step and end."""
        if not self._is_terminated:  # a second signal would end it in the middle of that step
            self._is_terminated = True
            self._process.terminate()

    def wait(self, timeout_s: float | None = None) -> int:
        """Close its input and wait until the child ends; kill it if that takes too long.

        Returns its exit status.
        """
        self.close_input()
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return self.kill()
        self._join_readers()
        return status

    def stop(self, grace_s: float) -> int:
        """Ask the child to end, and kill it after `grace_s` seconds. Returns its exit status."""
        self.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        return self.kill()

    def kill(self) -> int:
        """End the child and every process it has started. Returns its exit status."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return self.wait()

    def _join_readers(self) -> None:
        for reader in self._readers:
            reader.join(READ_S)

    @staticmethod
    def _reader(read: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=read, args=arguments, daemon=True)
        thread.start()
        return thread

    def _read_messages(self, pipe: IO[bytes]) -> None:
        with pipe:
            while line := pipe.readline(MAX_MESSAGE_BYTES):
                message = _parse(line)
                if message is None:
                    self._process.kill()
                    break
                self.last_message_s = time.monotonic()
                self._messages.put(message)
        self._messages.put(None)

    def _read_log(self, pipe: IO[bytes], log: logging.Logger) -> None:
        with pipe:
            for line in pipe:
                text = line.decode(errors="replace").rstrip()
                if text:
                    self._last_lines.append(text)
                    log.info("process %d: %s", self.pid, text)


class Report(NamedTuple):
    """The state of a supervised child.

    Attributes:
        messages: those since the last report.
        status: its exit status, negative if a signal ended it; None while it runs.
        is_stalled: whether it runs, but has been silent for too long.
    """

    messages: list[Message]
    status: int | None
    is_stalled: bool

    @property
    def failure(self) -> str | None:
        """Why the child has to be replaced, such as `signal 9`; None while it works."""
        if self.status is None:
            return "stalled" if self.is_stalled else None
        return f"status {self.status}" if self.status >= 0 else f"signal {-self.status}"


class Supervisor:
    """Keeps a child process running: replaces one that died or stalled, while it makes progress.

    Attributes:
        process: the present child.
        deaths: children that died or stalled since the last progress.
    """

    def __init__(self, start: Callable[[], ChildProcess], *, stall_s: float) -> None:
        """Start the first child.

        Args:
            start: starts a child.
            stall_s: seconds without a message after which a child counts as stalled.

        Raises:
            OSError: it cannot be started.
        """
        self._start = start
        self._stall_s = stall_s
        self._best_progress = 0
        self._has_reported = False
        self.deaths = 0
        self.process = start()

    def report(self) -> Report:
        """Collect messages and check the child. Does not wait."""
        status = self.process.exit_status()  # first: then no message can come after it
        messages = list(self.process.messages())
        self._has_reported |= bool(messages)
        limit_s = self._stall_s if self._has_reported else max(START_S, self._stall_s)
        silent_s = time.monotonic() - self.process.last_message_s
        return Report(messages, status, is_stalled=status is None and silent_s > limit_s)

    def note_progress(self, amount: int) -> None:
        """Take note of how much is done in total; more than ever before resets the restarts.

        Pass what is done by all children together: a child may die between finishing a piece of
        work and reporting it, and then only the next child reports that piece.
        """
        if amount > self._best_progress:
            self.deaths, self._best_progress = 0, amount

    def restart(self) -> bool:
        """Replace the child. Returns False, without a new child, after too many restarts.

        Raises:
            OSError: the new child cannot be started.
        """
        self.process.kill()
        self.deaths += 1
        if self.deaths > MAX_RESTARTS:
            return False
        self._has_reported = False
        self.process = self._start()
        return True


class ParentConnection:
    """The child's end of the protocol. There is one per process, made before anything prints."""

    def __init__(self) -> None:
        # Unbuffered: a buffer has a lock, which another thread may hold when the process ends.
        self._input = os.fdopen(os.dup(0), "rb", buffering=0)
        self._output = os.fdopen(os.dup(1), "wb")
        # What libraries print goes to standard error, and not between the messages.
        os.dup2(2, 1)

    def receive(self) -> Message | None:
        """Wait for the next message; None when the parent has closed its end or is gone."""
        line = self._input.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def messages(self) -> Iterator[Message]:
        """All messages until the parent closes its end."""
        while (message := self.receive()) is not None:
            yield message

    def send(self, message: Message) -> None:
        """Send a message. Does nothing if the parent is gone."""
        with suppress(BrokenPipeError):
            self._output.write(json.dumps(message).encode() + b"\n")
            self._output.flush()


def _import_path() -> str:
    """`PYTHONPATH` with which a child imports from where this process does."""
    package = str(Path(cache_service.__file__).parents[1])
    return os.pathsep.join(dict.fromkeys([*filter(None, sys.path), package]))


def _parse(line: bytes) -> Message | None:
    """The message of a line; None if the line is not whole or not a JSON object."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if line.endswith(b"\n") and isinstance(message, dict) else None
