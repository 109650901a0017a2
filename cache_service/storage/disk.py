"""Rows of a server and objects of a bucket kept on a local disk, up to a number of bytes.

A cache of a cache: losing it loses time only. What is read is checked like an answer, what cannot
be written is not kept, and several processes may share the folder.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_service.format.canonical import canonical_json, sha256_hex
from cache_service.format.frame import checksum_of
from cache_service.human_format import human_bytes

LOG = logging.getLogger(__name__)

_OURS = re.compile(r"[0-9a-f]{64}\.(rows|tmp)")
"""Nothing else in the folder is ever counted or removed."""

_CHECKSUM_BYTES = 8
_SLOTS = 64
"""Lock files. Two pieces that share one are fetched one after the other, which is no harm."""


class _Turns:
    """Locks between processes do not hold between threads of one; these do."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """All free: whoever held one in the parent is not here."""
        self.by_slot = [threading.Lock() for _ in range(_SLOTS + 1)]


_TURNS = _Turns()
os.register_at_fork(after_in_child=_TURNS.renew)


class DiskCache:
    """Pieces by key, the least recently used ones removed first.

    Attributes:
        usable: False once the disk refused something: the run goes on without it.
        max_bytes: of all pieces together.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        self.usable = True
        self._folder = Path(folder)
        self.max_bytes = max_bytes

    @staticmethod
    def key_of(facts: Any) -> str:
        """A key from what identifies a piece."""
        return sha256_hex(canonical_json(facts))

    def get(self, key: str) -> tuple[bytes, str] | None:
        """A piece and the checksum it was stored with, both unchecked; None where there is none."""
        path = self._path(key)
        with self._or_without(), suppress(FileNotFoundError):
            content = path.read_bytes()
            os.utime(path)  # used just now, so not the next to go
            checksum = content[-_CHECKSUM_BYTES:].decode("ascii", "replace")
            return content[:-_CHECKSUM_BYTES], checksum
        return None

    def map(self, key: str) -> NDArray[np.uint8] | None:
        """As `get`, as a read-only memory map without the checksum: it outlives a removal."""
        path = self._path(key)
        with self._or_without(), suppress(FileNotFoundError, ValueError):  # ValueError: it is empty
            mapped = np.memmap(path, np.uint8, mode="r")
            os.utime(path)
            return mapped[:-_CHECKSUM_BYTES]
        return None

    def drop(self, key: str) -> bool:
        """Remove a piece. Whether there was one."""
        with self._or_without(), suppress(FileNotFoundError):
            self._path(key).unlink()
            return True
        return False

    def put(self, key: str, content: bytes) -> None:
        """Keep a piece if there is room for it, or can be made."""
        size = len(content) + _CHECKSUM_BYTES
        if size > self.max_bytes:
            return
        with self._or_without(), self._lock(_SLOTS):
            self._make_room(size)
            temporary = self._folder / f"{DiskCache.key_of(uuid.uuid4().hex)}.tmp"
            try:
                temporary.write_bytes(content + checksum_of(content).encode())
                temporary.replace(self._path(key))
            finally:
                temporary.unlink(missing_ok=True)

    @contextmanager
    def one_at_a_time(self, key: str) -> Iterator[None]:
        """Among processes that need the same piece, one fetches it and the rest find it."""
        with self._lock(int(key[:8], 16) % _SLOTS):
            yield

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.rows"

    def _make_room(self, size: int) -> None:
        # Under the lock nobody writes: temporary files are what a killed process left.
        found = []
        for entry in os.scandir(self._folder):
            if _OURS.fullmatch(entry.name):
                facts = entry.stat()
                age = 0 if entry.name.endswith(".tmp") else facts.st_mtime_ns
                found.append((age, facts.st_size, entry.path))
        total = sum(length for _, length, _ in found)
        free = shutil.disk_usage(self._folder).free
        most = min(self.max_bytes, (total + free) // 2)
        if size > most:
            raise OSError(
                errno.ENOSPC, f"only {human_bytes(free)} are free, and half of them stay free"
            )
        for age, length, path in sorted(found):
            if age and total + size <= most:
                break
            os.unlink(path)  # noqa: PTH108  scandir's own path
            total -= length

    @contextmanager
    def _lock(self, slot: int) -> Iterator[None]:
        """Exclude other processes and threads; nobody, where the disk has no locks."""
        with _TURNS.by_slot[slot]:
            handle = None
            with self._or_without():
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                handle = os.open(self._folder / f".lock-{slot}", os.O_CREAT | os.O_RDWR, 0o600)
                fcntl.lockf(handle, fcntl.LOCK_EX)
            try:
                yield
            finally:
                if handle is not None:
                    os.close(handle)

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            if self.usable:
                LOG.warning(
                    "The disk cache %s is no longer used (%s); rows are read from the server or "
                    "bucket.",
                    self._folder,
                    problem.strerror,
                )
            self.usable = False
