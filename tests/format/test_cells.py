"""Coarser cells follow from finer ones exactly where we say that they do."""

from __future__ import annotations

import numpy as np
import pytest

from cache_service.format.cells import choose_stored_scales, expand_cells, num_cells


def pool(map_BXYC: np.ndarray, side: int) -> np.ndarray:
    """Mean over each of side x side blocks, one block at a time: the slow way, [B, side^2, C]."""
    step = map_BXYC.shape[1] // side
    blocks = [
        map_BXYC[:, row * step : (row + 1) * step, column * step : (column + 1) * step].mean((1, 2))
        for row in range(side)
        for column in range(side)
    ]
    return np.stack(blocks, axis=1)


@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 4), (1, 2, 4), (1, 3, 6), (1, 2, 4, 8)])
def test_expanding_the_finest_grid_equals_pooling_each_scale_from_the_map(scales):
    map_BXYC = np.random.default_rng(0).normal(size=(3, 24, 24, 5)).astype(np.float32)
    wanted = np.concatenate([pool(map_BXYC, side) for side in scales], axis=1)
    finest = pool(map_BXYC, scales[-1])
    found = expand_cells(finest, scales, scales[-1:])
    assert found.shape == (3, num_cells(scales), 5)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_an_affine_head_of_a_mean_is_the_mean_of_the_heads():
    rng = np.random.default_rng(1)
    map_BXYC, weight, bias = rng.normal(size=(2, 8, 8, 6)), rng.normal(size=(6, 4)), rng.normal()
    logits = np.concatenate([pool(map_BXYC, side) for side in (1, 2, 4)], 1) @ weight + bias
    stored = (pool(map_BXYC, 4) @ weight + bias).astype(np.float32)
    np.testing.assert_allclose(expand_cells(stored, (1, 2, 4), (4,)), logits, atol=1e-5)


def test_cells_that_are_all_stored_come_back_untouched():
    cells = np.random.default_rng(2).normal(size=(2, 5, 3)).astype(np.float32)
    assert expand_cells(cells, (1, 2), (1, 2)) is cells


@pytest.mark.parametrize(
    ("scales", "facts", "stored"),
    [
        ((1,), {}, (1,)),
        ((1, 2, 4), {}, (4,)),
        ((1, 2, 4), {"map_side": 4}, (4,)),
        # A grid that the map's side does not divide into has cells that overlap.
        ((1, 2, 4), {"map_side": 7}, (1, 2, 4)),
        # ... but chained pooling defines the coarser cells by the finer ones.
        ((1, 2, 4), {"map_side": 7, "chained": True}, (4,)),
        ((1, 2, 4), {"map_side": None}, (1, 2, 4)),
        ((1, 2, 4), {"map_side": None, "chained": True}, (4,)),
        # The mean of the heads is not the head of the mean.
        ((1, 2, 4), {"affine_head": False}, (1, 2, 4)),
        ((1, 2, 4), {"affine_head": False, "chained": True}, (1, 2, 4)),
        # 2 does not divide 3, 3 does not divide 4.
        ((1, 2, 3), {"map_side": 12}, (1, 2, 3)),
        ((1, 3, 4), {"map_side": 12, "chained": True}, (1, 3, 4)),
        ((1, 7), {"map_side": 7}, (7,)),
    ],
)
def test_only_the_finest_grid_is_stored_where_it_says_it_all(scales, facts, stored):
    usual = {"map_side": 8, "affine_head": True, "chained": False}
    assert choose_stored_scales(scales, **(usual | facts)) == stored
