"""Arithmetic of the cells of the SDD grids: how many there are, and which follow from others.

Shape letters: B batch, R cells, C classes or channels. Cells are ordered by scale, the whole image
first, and row-major within a scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def num_cells(scales: Sequence[int]) -> int:
    """Cells over all scales: (1, 2, 4) -> 21."""
    return sum(side * side for side in scales)


def choose_stored_scales(
    scales: Sequence[int], *, map_side: int | None, affine_head: bool, chained: bool
) -> tuple[int, ...]:
    """The scales that must be stored so that all of `scales` can be read back.

    With an affine head the logits of a cell are the mean of the logits of any partition of it into
    equal parts. Where every scale divides the finest one and that one divides the map, the finest
    grid is therefore enough. `chained` pooling derives coarser cells from the finest by
    definition, whatever the map's side.
    """
    finest = scales[-1]
    nested = all(finest % side == 0 for side in scales)
    exact = chained or (map_side is not None and map_side % finest == 0)
    return (finest,) if affine_head and nested and exact else tuple(scales)


def expand_matrix(scales: Sequence[int], stored_scales: Sequence[int]) -> NDArray[np.float32]:
    """Averaging matrix [R, R_stored]: cells = matrix @ stored cells."""
    if tuple(scales) == tuple(stored_scales):
        return np.eye(num_cells(scales), dtype=np.float32)
    (finest,) = stored_scales
    row, column = np.divmod(np.arange(finest * finest), finest)
    matrix = np.zeros((num_cells(scales), finest * finest), np.float32)
    first = 0
    for side in scales:
        block = finest // side
        cell = (row // block) * side + column // block
        matrix[first + cell, np.arange(finest * finest)] = 1.0 / (block * block)
        first += side * side
    return matrix


def expand_cells(
    stored_BRC: NDArray[np.float32], scales: Sequence[int], stored_scales: Sequence[int]
) -> NDArray[np.float32]:
    """All cells of `scales` from the stored ones, float32 [B, R, C]."""
    if tuple(scales) == tuple(stored_scales):
        return stored_BRC
    cells_BRC: NDArray[np.float32] = expand_matrix(scales, stored_scales) @ stored_BRC
    return cells_BRC
