"""Stored objects that lie in memory maps, so that ranges of them are sent without a thread.

An object is what it was as long as its file has the same inode, size and time of change. A byte is
sent from the event loop only after its part of the file was read once on a thread, because reading
a page that is not in memory blocks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

StoredT = TypeVar("StoredT")

PART_BYTES = 1 << 20
"""Parts of an object that are read at once before they count as being in memory."""

PAGE_BYTES = 4096


class MappedObject(Generic[StoredT]):
    """One object, mapped.

    Attributes:
        stored: what the service found out about the object when it was mapped.
    """

    def __init__(self, stored: StoredT, path: Path, mapped: NDArray[np.uint8]) -> None:
        self.stored = stored
        self._path = str(path)
        self._stamp = _stamp(self._path)
        self._mapped = np.ndarray(len(mapped), np.uint8, buffer=mapped.data)
        self._touched = np.zeros(-(-len(mapped) // PART_BYTES), np.bool_)

    def is_current(self) -> bool:
        """Whether the file is still the one that was mapped. Takes microseconds."""
        return self._stamp is not None and _stamp(self._path) == self._stamp

    def is_ready(self, start: int, stop: int) -> bool:
        """Whether bytes [start, stop) were read before."""
        return bool(self._touched[_parts(start, stop)].all())

    def touch(self, start: int, stop: int) -> None:
        """Read one byte of every page of the parts that hold [start, stop). May block."""
        parts = _parts(start, stop)
        first, last = parts.start * PART_BYTES, parts.stop * PART_BYTES
        int(self._mapped[first:last:PAGE_BYTES].sum())
        self._touched[parts] = True

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop), not copied."""
        return self._mapped[start:stop].data


def _parts(start: int, stop: int) -> slice:
    return slice(start // PART_BYTES, max(stop - 1, start) // PART_BYTES + 1)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  twice as fast
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns)
