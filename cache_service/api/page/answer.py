"""One recorded row as figures to look at: likeliest classes, cells, verdicts. numpy only.

Shape letters: R cells, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.format.cells import expand_cells
from cache_service.format.codecs import Arrays, Head
from cache_service.format.spec import CacheSpec

NUM_LIKELIEST = 5

Floats = NDArray[np.float32]


class Likely(NamedTuple):
    """A class with its logit and its probability, over the whole image."""

    label: int
    logit: float
    share: float


class CellAnswer(NamedTuple):
    """What the teacher said about one cell.

    Attributes:
        row, column: of the cell in its grid, from 0.
        top: the likeliest class.
        top_share: its probability.
        target_share: probability of the target class.
        target_logit: its logit.
        complementary: whether exactly one of the verdicts on the cell and on the whole image names
            the label; None where no label is known.
    """

    row: int
    column: int
    top: int
    top_share: float
    target_share: float
    target_logit: float
    complementary: bool | None


class Grid(NamedTuple):
    """The cells of one scale, m x m, row by row."""

    scale: int
    cells: tuple[CellAnswer, ...]


class Answer(NamedTuple):
    """Everything that the page shows of one row.

    Attributes:
        target: the class that the maps show: the label, or where none is known the verdict.
        likeliest: over the whole image, best first.
        target_place: rank of the target over the whole image, from 1.
        whole: the target over the whole image.
        grids: by scale.
    """

    target: int
    likeliest: tuple[Likely, ...]
    target_place: int
    whole: Likely
    grids: tuple[Grid, ...]


def cell_logits(spec: CacheSpec, rows: Arrays, head: Head | None) -> Floats:
    """Logits of all cells of the first row, float32 [R, C]."""
    stored_BSC = spec.decode(rows, head=head)
    cells_RC: Floats = expand_cells(stored_BSC, spec.scales, spec.stored_scales)[0]
    return cells_RC


def verdict(logits_RC: Floats) -> int:
    """The class that the teacher names for the whole image."""
    return int(logits_RC[0].argmax())


def describe_answer(spec: CacheSpec, logits_RC: Floats, label: int | None) -> Answer:
    """Figures of one row.

    A cell is complementary where (its verdict is the label) != (the whole image's is).

    Args:
        spec: of the cache.
        logits_RC: from `cell_logits`.
        label: the sample's class, of a mixed view that of its larger part; None if not known.
    """
    shares_RC = _softmax(logits_RC)
    target = verdict(logits_RC) if label is None else label
    ranked = np.argsort(-logits_RC[0], kind="stable")
    tops_R = logits_RC.argmax(axis=1)
    right_R = tops_R == target
    odd_R = right_R != right_R[0]
    grids, first = [], 0
    for scale in spec.scales:
        here = range(first, first + scale * scale)
        cells = tuple(
            CellAnswer(
                row=(index - first) // scale,
                column=(index - first) % scale,
                top=int(tops_R[index]),
                top_share=float(shares_RC[index, tops_R[index]]),
                target_share=float(shares_RC[index, target]),
                target_logit=float(logits_RC[index, target]),
                complementary=None if label is None else bool(odd_R[index]),
            )
            for index in here
        )
        grids.append(Grid(scale, cells))
        first = here.stop
    likeliest = [_likely(logits_RC, shares_RC, int(c)) for c in ranked[:NUM_LIKELIEST]]
    return Answer(
        target=target,
        likeliest=tuple(likeliest),
        target_place=int(np.flatnonzero(ranked == target)[0]) + 1,
        whole=_likely(logits_RC, shares_RC, target),
        grids=tuple(grids),
    )


def _likely(logits_RC: Floats, shares_RC: NDArray[np.float64], label: int) -> Likely:
    return Likely(label, float(logits_RC[0, label]), float(shares_RC[0, label]))


def _softmax(logits_RC: Floats) -> NDArray[np.float64]:
    wide_RC = logits_RC.astype(np.float64)
    shares_RC: NDArray[np.float64] = np.exp(wide_RC - wide_RC.max(axis=1, keepdims=True))
    shares_RC /= shares_RC.sum(axis=1, keepdims=True)
    return shares_RC
