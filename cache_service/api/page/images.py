"""Images of samples and views, rendered in a child process that is started when it is needed.

The server itself never imports Pillow or torch. A dataset whose decoder hangs or crashes costs a
picture, and nothing else.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from cachetools import LRUCache

from cache_service.errors import DatasetError
from cache_service.processes import ChildProcess, module_command

LOG = logging.getLogger("kdcache.page")

COMMAND = module_command("cache_service.api.page.image_worker")

TIMEOUT_S = 90.0
"""Time for one request: the first imports torch and opens a dataset, both slow on a busy disk."""

IDLE_S = 300.0
"""Time without a request after which the process ends and its memory is free again."""

EXIT_S = 1.0
"""Time between the end of the process's output and its own end."""

MAX_QUEUED = 8
"""Requests that wait for the process; one more is refused."""

MAX_BLOCKED = 6
"""Callers that may block until their images are ready: each holds a thread of the server."""

MAX_KEPT = 16
"""Results in memory: about 1 MB each at most."""

Images = Mapping[str, Any]
"""The images of a sample; see `image_worker.ImageWorker.render`."""


class ImageError(DatasetError):
    """The images of a sample cannot be rendered. The recorded rows are not affected."""


class ImageRenderer:
    """Renders images in a child process, one request at a time.

    It may be used from several threads.
    """

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
        self._may_block = threading.BoundedSemaphore(MAX_BLOCKED)
        self._jobs: queue.Queue[tuple[str, Future[Images]] | None] = queue.Queue(MAX_QUEUED)
        self._results: LRUCache[str, Future[Images]] = LRUCache(MAX_KEPT)
        self._thread: threading.Thread | None = None
        self._process: ChildProcess | None = None
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        """Of the child process; None if there is none."""
        process = self._process
        return None if process is None else process.pid

    def render(self, request: Mapping[str, Any], *, wait_s: float) -> Images | None:
        """The images of a request, or None if they are not ready in time: then ask again.

        Raises:
            ImageError: they cannot be rendered, or too many requests wait.
        """
        key = json.dumps(request, sort_keys=True)
        with self._lock:
            future = self._results.get(key) or self._enqueue(key)
        blocks = self._may_block.acquire(blocking=False)
        try:
            return future.result(wait_s if blocks else 0)
        except TimeoutError:
            return None
        except ImageError:
            with self._lock:
                self._results.pop(key, None)  # the next request tries again
            raise
        finally:
            if blocks:
                self._may_block.release()

    def close(self) -> None:
        """End the process and the thread."""
        with self._lock:
            self._is_closed = True
        while self._thread is not None and self._thread.is_alive():
            process = self._process
            if process is not None:
                process.kill()
            with suppress(queue.Full):  # if it is full, the thread does not wait for a job
                self._jobs.put_nowait(None)
            self._thread.join(0.05)

    def _enqueue(self, key: str) -> Future[Images]:
        if self._is_closed:
            raise ImageError("the server is shutting down.")
        future: Future[Images] = Future()
        try:
            self._jobs.put_nowait((key, future))
        except queue.Full:
            raise ImageError(
                f"{MAX_QUEUED} other samples wait to be rendered.", hint="Load the page again."
            ) from None
        self._results[key] = future
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="page-images", daemon=True)
            self._thread.start()
        return future

    def _work(self) -> None:
        while not self._is_closed:
            try:
                job = self._jobs.get(timeout=self._idle_s)
            except queue.Empty:
                self._end_process()
                continue
            if job is not None:
                key, future = job
                try:
                    future.set_result(self._exchange(json.loads(key)))
                except ImageError as refusal:
                    future.set_exception(refusal)
        self._end_process()
        while not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                job[1].set_exception(ImageError("the server is shutting down."))

    def _exchange(self, request: dict[str, Any]) -> Images:
        process = self._running_process()
        process.send(request)
        try:
            images = process.receive(self._timeout_s)
        except TimeoutError:
            self._end_process()
            raise ImageError(
                f"rendering took longer than {self._timeout_s:g} s and was stopped.",
                hint="Load the page again to start a new process.",
            ) from None
        if images is None:
            status = process.wait(EXIT_S)
            self._end_process()
            raise ImageError(
                f"the rendering process ended with status {status}.",
                hint="Load the page again to start a new process.",
            )
        if "error" in images:
            raise ImageError(images["error"]["detail"], hint=images["error"]["hint"])
        return images

    def _running_process(self) -> ChildProcess:
        if self._process is None or self._process.exit_status() is not None:
            self._end_process()
            try:
                self._process = ChildProcess(
                    self._command, environment={"OMP_NUM_THREADS": "1"}, log=LOG
                )
            except OSError as problem:
                raise ImageError(f"the rendering process does not start: {problem}.") from problem
        return self._process

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
