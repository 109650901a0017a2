"""The server's side of the drawing process: started when needed, replaced when it fails, ended.

The process is an own one so that the server never imports Pillow or torch, and so that a dataset
that hangs or crashes its decoder costs a picture and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import cache_service
from cache_service.errors import DatasetError

COMMAND = (sys.executable, "-P", "-m", "cache_service.api.page.render_worker")

TIMEOUT_S = 90.0
"""What a scene gets: the first one imports torch and opens a dataset, both slow on a busy disk."""

IDLE_S = 300.0
"""Time without a request after which the process ends and gives its memory back."""

MAX_WAITING = 8
"""Scenes asked for and not drawn yet; one more is turned away."""

MAX_SEATED = 6
"""Requests that may sit and wait at a time: each holds a thread. Others come again."""

MAX_KEPT = 16
"""Scenes remembered: about 1 MB each at most."""

MAX_LINE = 16 << 20
"""Bytes of an answer."""

Scene = Mapping[str, Any]
"""What `render_worker.Painter.scene` returns."""


class DrawingError(DatasetError):
    """The pictures of a sample cannot be drawn. The recorded answers are not touched by that."""


class Renderer:
    """Draws scenes in a process of its own, one at a time. Safe to call from several threads."""

    def __init__(
        self,
        *,
        command: Sequence[str] = COMMAND,
        timeout_s: float = TIMEOUT_S,
        idle_s: float = IDLE_S,
    ) -> None:
        self._command = tuple(command)
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._seats = threading.BoundedSemaphore(MAX_SEATED)
        self._jobs: queue.Queue[tuple[str, Future[Scene]] | None] = queue.Queue(MAX_WAITING)
        self._scenes: OrderedDict[str, Future[Scene]] = OrderedDict()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the drawing process; None where there is none."""
        return None if self._process is None else self._process.pid

    def scene(self, request: Mapping[str, Any], *, wait_s: float) -> Scene | None:
        """The scene, or None where it is not drawn yet; ask again.

        Raises:
            DrawingError: it cannot be drawn, or too many others wait to be.
        """
        key = json.dumps(request, sort_keys=True)
        with self._lock:
            future = self._scenes.get(key) or self._enqueue(key)
            self._scenes.move_to_end(key)
        seated = self._seats.acquire(blocking=False)
        try:
            return future.result(wait_s if seated else 0)
        except TimeoutError:
            return None
        except DrawingError:
            with self._lock:
                self._scenes.pop(key, None)  # the next request tries again
            raise
        finally:
            if seated:
                self._seats.release()

    def close(self) -> None:
        """End the process and the thread."""
        with self._lock:
            self._closed = True
        while self._thread is not None and self._thread.is_alive():
            process = self._process
            if process is not None:
                process.kill()
            with contextlib.suppress(queue.Full):  # a full queue keeps nobody waiting for a job
                self._jobs.put_nowait(None)
            self._thread.join(0.05)

    def _enqueue(self, key: str) -> Future[Scene]:
        if self._closed:
            raise DrawingError("the server is shutting down.")
        future: Future[Scene] = Future()
        try:
            self._jobs.put_nowait((key, future))
        except queue.Full:
            raise DrawingError(
                f"{MAX_WAITING} pictures are waiting to be drawn.", hint="Load the page again."
            ) from None
        self._scenes[key] = future
        while len(self._scenes) > MAX_KEPT:
            self._scenes.popitem(last=False)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="page-renderer", daemon=True)
            self._thread.start()
        return future

    def _work(self) -> None:
        while not self._closed:
            try:
                job = self._jobs.get(timeout=self._idle_s)
            except queue.Empty:
                self._end()
                continue
            if job is not None:
                self._draw(*job)
        self._end()
        while not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                job[1].set_exception(DrawingError("the server is shutting down."))

    def _draw(self, key: str, future: Future[Scene]) -> None:
        try:
            future.set_result(self._ask(key))
        except DrawingError as refusal:
            future.set_exception(refusal)

    def _ask(self, line: str) -> Scene:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        clock = threading.Timer(self._timeout_s, give_up)
        clock.daemon = True
        clock.start()
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            content = process.stdout.readline(MAX_LINE)
        except OSError:
            content = b""
        finally:
            clock.cancel()
        if not content.endswith(b"\n"):
            self._end()
            raise DrawingError(
                f"the picture took longer than {self._timeout_s:g} s and was given up."
                if late.is_set()
                else f"the drawing process ended with status {process.returncode}.",
                hint="Load the page again: another one is started.",
            )
        scene: dict[str, Any] = json.loads(content)
        if "error" in scene:
            raise DrawingError(scene["error"], hint=scene["hint"])
        return scene

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            # -P keeps the current folder off the path, so the package's own place is named.
            home = str(Path(cache_service.__file__).parents[1])
            path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), home)))
            try:
                self._process = subprocess.Popen(  # noqa: S603  our own module
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C of a terminal is the server's
                )
            except OSError as error:
                raise DrawingError(f"the drawing process does not start: {error}.") from error
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what it was sent and never read
                    assert stream is not None
                    stream.close()
