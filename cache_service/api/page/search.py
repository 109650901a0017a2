"""Samples worth a look: found in a bounded number of recorded rows, in bounded time.

Shape letters: B rows of a step, N rows that were read, R cells of all scales, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.api.page.row_figures import Commits, Floats
from cache_service.errors import CorruptError
from cache_service.format.cells import expand_cells
from cache_service.format.spec import CacheSpec
from cache_service.rows.reader import Cache

MAX_ROWS = 4096
"""Rows that one search reads at most."""

MAX_S = 1.0
"""Seconds after which a search ends, with what it has read."""

STEP_LOGITS, STEP_ROWS = 1 << 21, 256
"""Logits that are decoded at a time, as float32, and the largest number of rows."""

NUM_FOUND = 12
"""Samples on a page of results."""

Ints = NDArray[np.int64]


class Scan(NamedTuple):
    """What was read of one seed, in the order of its recording.

    Attributes:
        positions_N, samples_N: of the rows.
        tops_N: the class predicted from the whole view.
        probabilities_N: of that class.
        num_classes_N: number of different classes predicted from the cells of the finest grid.
        seconds: that reading took.
        next_start: position at which another scan goes on; None at the end of what is recorded.
        damage: found in rows, which are left out.
    """

    positions_N: Ints
    samples_N: Ints
    tops_N: Ints
    probabilities_N: Floats
    num_classes_N: Ints
    seconds: float
    next_start: int | None
    damage: CorruptError | None


def scan_rows(
    cache: Cache,
    commits: Commits,
    seed: int,
    start: int,
    *,
    max_rows: int = MAX_ROWS,
    max_s: float = MAX_S,
) -> Scan:
    """Read recorded rows of a seed from a position on, up to the limits of rows and time.

    Args:
        cache: to read.
        commits: its recorded shards.
        seed: of the rows.
        start: first position.
        max_rows, max_s: limits; at least one step is read.
    """
    began_s, spec, head = time.monotonic(), cache.spec, cache.head()
    parts: list[tuple[Ints, Ints, Ints, Floats, Ints]] = []
    num_read, damage, next_start = 0, None, None
    for first, stop in _steps(spec, commits, seed, start):
        if num_read and (num_read >= max_rows or time.monotonic() - began_s >= max_s):
            next_start = first
            break
        num_read += stop - first
        try:
            rows = cache.read(seed, first, stop)
        except CorruptError as found:
            damage = found
            continue
        stored_BSC = spec.decode(rows, head=head)
        cells_BRC = expand_cells(stored_BSC, spec.scales, spec.stored_scales)
        parts.append(
            (np.arange(first, stop), rows["sample"].astype(np.int64), *_figures(spec, cells_BRC))
        )
    none = np.empty(0, np.int64)
    columns = zip(*parts, strict=True) if parts else [[none], [none], [none], [none], [none]]
    positions_N, samples_N, tops_N, probabilities_N, num_classes_N = map(np.concatenate, columns)
    return Scan(
        positions_N,
        samples_N,
        tops_N,
        probabilities_N.astype(np.float32),
        num_classes_N,
        time.monotonic() - began_s,
        next_start,
        damage,
    )


def _steps(spec: CacheSpec, commits: Commits, seed: int, start: int) -> Iterator[tuple[int, int]]:
    """Recorded positions [first, stop) from a position on, a step at a time."""
    logits = spec.num_cells * spec.teacher.num_classes
    size = int(np.clip(STEP_LOGITS // logits, 1, STEP_ROWS))
    for shard in commits.get(seed, ()):
        begin, end = spec.shard_range(shard)
        for first in range(max(begin, start), end, size):
            yield first, min(first + size, end)


def _figures(spec: CacheSpec, cells_BRC: Floats) -> tuple[Ints, Floats, Ints]:
    """Prediction from the whole view, its probability, and the number of classes in the cells."""
    whole_BC = cells_BRC[:, 0].astype(np.float64)
    tops_B = whole_BC.argmax(axis=1)
    best_B = whole_BC.max(axis=1)
    probabilities_B = 1 / np.exp(whole_BC - best_B[:, None]).sum(axis=1)
    cell_tops_BR = np.sort(cells_BRC[:, -(spec.scales[-1] ** 2) :].argmax(axis=2), axis=1)
    num_classes_B = 1 + (np.diff(cell_tops_BR, axis=1) != 0).sum(axis=1)
    return tops_B, probabilities_B.astype(np.float32), num_classes_B


def least_certain(scan: Scan) -> Ints:
    """The rows of a scan whose prediction has the lowest probability, lowest first."""
    return np.argsort(scan.probabilities_N, kind="stable")[:NUM_FOUND]


def most_classes(scan: Scan) -> Ints:
    """The rows whose finest cells predict the most different classes, most first."""
    return np.argsort(-scan.num_classes_N, kind="stable")[:NUM_FOUND]


def predicted_as(scan: Scan, label: int) -> Ints:
    """The rows that are predicted as a class, the most certain first."""
    return _most_certain(scan, scan.tops_N == label)


def differing(scan: Scan, labels_N2: Ints) -> Ints:
    """The rows whose prediction is no label of the view, the most certain first.

    Args:
        scan: of the rows.
        labels_N2: label of each row's sample and of its mixing partner; the same twice if the view
            is not mixed.
    """
    return _most_certain(scan, (scan.tops_N[:, None] != labels_N2).all(axis=1))


def _most_certain(scan: Scan, chosen_N: NDArray[np.bool_]) -> Ints:
    rows = np.flatnonzero(chosen_N)
    return rows[np.argsort(-scan.probabilities_N[rows], kind="stable")[:NUM_FOUND]]
