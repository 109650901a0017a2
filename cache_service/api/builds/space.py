"""Whether builds lack space: from what happened to them, not from what the queue could store.

A full disk may hold the queue, too. Then the end of a build cannot be written, and its row in the
database says `running` until there is space again. What is kept here is in memory.
"""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cache_service.config import Frozen

LOG = logging.getLogger("kdcache.builds")

REPEAT_S = 60.0
"""What stays wrong is logged again after this time, seconds."""

FREED_BYTES = 64 << 20
"""Space counts as freed when so much more is free: one shard. Less comes and goes by itself."""


class OutOfSpace(Frozen):
    """No build of this server can go on, because a disk is full."""

    since_s: Annotated[float, Field(description="Unix time of the first write that failed.")]
    detail: Annotated[str, Field(description="The error of that write.")]


class SpaceWatch:
    """Remembers since when builds lack space. Safe to use from several threads.

    Args:
        folders: that builds write to; the fullest one counts.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._lock = threading.Lock()
        self._shortage: OutOfSpace | None = None
        self._free_then = 0
        self._logged_s = float("-inf")

    def free_bytes(self) -> float:
        """Free bytes where builds write, for an unprivileged user; NaN if that is not known."""
        found = [shutil.disk_usage(folder).free for folder in self._folders if folder.is_dir()]
        return min(found, default=float("nan"))

    def note_full(self, detail: str) -> None:
        """A write failed for lack of space."""
        free = self.free_bytes()
        with self._lock:
            if self._shortage is None:
                self._shortage = OutOfSpace(since_s=time.time(), detail=detail)
            self._free_then = 0 if math.isnan(free) else int(free)

    def note_written(self) -> None:
        """A shard was recorded, so there is space."""
        with self._lock:
            self._shortage = None

    def state(self) -> OutOfSpace | None:
        """Since when space is lacking; None if it is not, or if much was freed since."""
        shortage = self._shortage
        if shortage is not None and self.free_bytes() >= self._free_then + FREED_BYTES:
            self.note_written()
            return None
        return shortage

    def remind(self) -> None:
        """Log the shortage, once a minute as long as it lasts."""
        shortage, now = self.state(), time.monotonic()
        if shortage is None or now - self._logged_s < REPEAT_S:
            return
        self._logged_s = now
        since = datetime.fromtimestamp(shortage.since_s, UTC).isoformat(timespec="seconds")
        LOG.error("no space is left for builds since %s: %s", since, shortage.detail)


class RepeatedWarning:
    """Logs a warning that comes again and again once a minute, and another one at once."""

    def __init__(self, log: Callable[[str], None] = LOG.warning) -> None:
        self._log = log
        self._last = ""
        self._logged_s = float("-inf")

    def __call__(self, text: str) -> None:
        """Log the text, unless it was logged within the last minute."""
        now = time.monotonic()
        if text != self._last or now - self._logged_s >= REPEAT_S:
            self._last, self._logged_s = text, now
            self._log(text)
