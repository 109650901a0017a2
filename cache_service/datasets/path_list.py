"""The paths of the samples of a dataset: one array of bytes with the end of each path.

As Python strings, the 14 million paths of ImageNet-21k would take 1.3 GB in every process. Here
they take 500 MB, in a file that all processes map (`cache_service.shared_arrays`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from cache_service.shared_arrays import GrowingArray

GROUP = 1 << 16
"""Paths that are Python objects at a time."""


class PathList:
    """Paths by sample, with "/" as separator. Empty if the samples are not files.

    Attributes:
        joined: all paths, with a NUL byte between two of them: uint8.
    """

    def __init__(self, paths: Iterable[str | bytes] = ()) -> None:
        """Encode the paths, a bounded number of them at a time."""
        joined, ends = GrowingArray(np.uint8), GrowingArray(np.int64)
        num_bytes = 0
        for group in _groups(paths):
            # The separator comes first, so that none follows the last path.
            text = b"\0".join([b"", *group] if num_bytes else group)
            lengths = np.fromiter(map(len, group), np.int64, len(group)) + 1
            ends.append(num_bytes + np.cumsum(lengths))
            num_bytes += int(lengths.sum())
            joined.append(np.frombuffer(text, np.uint8))
        self.joined: NDArray[np.uint8] = joined.finish()
        self._ends: NDArray[np.int64] = ends.finish()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, sample: int) -> bytes:
        start = int(self._ends[sample - 1]) if sample else 0
        return self.joined[start : int(self._ends[sample]) - 1].tobytes()

    def select(self, samples: Iterable[int]) -> PathList:
        """The paths of some samples; an empty list of an empty one."""
        return PathList(self[sample] for sample in samples) if len(self) else self


def _groups(paths: Iterable[str | bytes]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    for path in paths:
        group.append(os.fsencode(path))
        if len(group) == GROUP:
            yield group
            group = []
    if group:
        yield group
