"""Which shards of which seeds are recorded, as a picture of bars: pure functions of numbers.

A seed is a row and a shard a part of it. Where there are more of them than fit, neighbors share a
box, whose color says how much of it is there. Boxes of one color are one path, so the picture of
300 seeds x 1,000 shards takes no more than that of 30 x 64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WIDTH = 960
"""Units of the picture's width; the page stretches it to the room there is."""

ROW_HEIGHT, LOW_ROW_HEIGHT = 12, 7
"""Units, and pixels on the page, from one row to the next: of a few rows, and of many."""

FEW_ROWS = 12

GAP = 2
"""Units between boxes."""

LEVELS = 5
"""Colors: 0 nothing is recorded, 4 everything, 1 to 3 a third each of what is between."""


class Coverage(NamedTuple):
    """Counts over the planned part of a cache, and the boxes of its picture.

    Attributes:
        first_seed: where the picture begins; later than 0 where nothing before it was planned.
        num_seeds: seeds from there to the last planned one.
        num_shards: per seed.
        recorded: shards that are there.
        complete: seeds of which every shard is there.
        levels_YX: int [rows, columns], 0 to LEVELS - 1.
    """

    first_seed: int
    num_seeds: int
    num_shards: int
    recorded: int
    complete: int
    levels_YX: NDArray[np.int64]

    @property
    def planned(self) -> int:
        """Shards that are to be there in the end."""
        return self.num_seeds * self.num_shards

    @property
    def share(self) -> float:
        """Recorded part of what is planned."""
        return self.recorded / max(self.planned, 1)

    @property
    def seeds_per_row(self) -> float:
        """1 unless seeds share rows."""
        return self.num_seeds / max(len(self.levels_YX), 1)

    @property
    def shards_per_box(self) -> float:
        """1 unless shards share boxes."""
        return self.num_shards / max(int(self.levels_YX.shape[1]), 1)


def coverage(
    commits: Mapping[int, Sequence[int]],
    *,
    num_seeds: int,
    num_shards: int,
    rows: int = 40,
    columns: int = 64,
) -> Coverage:
    """Sum up what is recorded.

    Args:
        commits: recorded shards by seed.
        num_seeds: length of the seed axis.
        num_shards: per seed.
        rows, columns: boxes at most.
    """
    first = _first_planned(commits, num_seeds)
    seeds = num_seeds - first
    height, width = min(rows, seeds), min(columns, num_shards)
    counts_YX = np.zeros((height, width), np.int64)
    for seed, shards in commits.items():
        if first <= seed < num_seeds and len(shards):
            boxes = np.asarray(shards, np.int64) * width // num_shards
            counts_YX[(seed - first) * height // seeds] += np.bincount(boxes, minlength=width)
    per_row = np.bincount(np.arange(seeds) * height // max(seeds, 1), minlength=height)
    per_column = np.bincount(np.arange(num_shards) * width // num_shards, minlength=width)
    whole_YX = per_row[:, None] * per_column[None, :]
    partial_YX = 1 + counts_YX * (LEVELS - 2) // np.maximum(whole_YX, 1)
    levels_YX = np.where(counts_YX == 0, 0, np.where(counts_YX == whole_YX, LEVELS - 1, partial_YX))
    return Coverage(
        first_seed=first,
        num_seeds=seeds,
        num_shards=num_shards,
        recorded=sum(len(shards) for seed, shards in commits.items() if seed < num_seeds),
        complete=sum(len(s) == num_shards for seed, s in commits.items() if seed < num_seeds),
        levels_YX=levels_YX,
    )


def coverage_picture(found: Coverage, label: str) -> str:
    """The picture, as wide as its surroundings. Colors are classes of the page's style sheet.

    Args:
        found: what is there.
        label: what a screen reader says; already escaped.
    """
    height, width = found.levels_YX.shape
    box = WIDTH / max(width, 1)
    row = ROW_HEIGHT if height <= FEW_ROWS else LOW_ROW_HEIGHT
    paths: list[list[str]] = [[] for _ in range(LEVELS)]
    for y, levels_X in enumerate(found.levels_YX.tolist()):
        for x, level in enumerate(levels_X):
            left = round(x * box, 1)
            right = round((x + 1) * box - (GAP if x < width - 1 else 0), 1)
            top, tall = y * row, row - GAP
            paths[level].append(f"M{left:g} {top}H{right:g}v{tall}H{left:g}Z")
    drawn = "".join(
        f'<path class="have{level}" d="{"".join(parts)}"/>'
        for level, parts in enumerate(paths)
        if parts
    )
    tall = max(height * row - GAP, 1)
    return (
        f'<svg class="coverage" viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" height="{tall}" '
        f'preserveAspectRatio="none" role="img" aria-label="{label}">{drawn}</svg>'
    )


def _first_planned(commits: Mapping[int, Sequence[int]], num_seeds: int) -> int:
    """0, unless most of the seed axis lies before the first recorded seed.

    A build of the seeds 1000:1008 makes an axis of 1,008, of which it plans 8.
    """
    recorded = [seed for seed, shards in commits.items() if len(shards) and seed < num_seeds]
    first = min(recorded, default=0)
    return first if 2 * first > num_seeds else 0
