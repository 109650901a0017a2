from __future__ import annotations

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from cache_service.models.features import pool_cells


def random_map(side, channels=5):
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def published_chain(map_BDHW, scales):
    """The published pyramid: the finest grid from the map, the others from it."""
    finest = adaptive_avg_pool2d(map_BDHW, scales[-1])
    grids = [adaptive_avg_pool2d(finest, side).flatten(2) for side in scales]
    return torch.cat(grids, dim=2).transpose(1, 2)


@pytest.mark.parametrize("map_side", [1, 2, 4, 7, 8, 14])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_a_scale_is_adaptive_mean_pooling_of_the_map(map_side, side):
    map_BDHW = random_map(map_side)
    wanted = adaptive_avg_pool2d(map_BDHW, side).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool_cells(map_BDHW, (side,)), wanted)


def test_cells_come_scale_by_scale_and_row_by_row():
    map_BDHW = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert pool_cells(map_BDHW, (1, 2)).flatten().tolist() == [2.5, 1, 2, 3, 4]


@pytest.mark.parametrize("map_side", [4, 7, 8, 14])
def test_chained_pooling_is_the_published_one(map_side):
    map_BDHW = random_map(map_side)
    cells = pool_cells(map_BDHW, (1, 2, 4), pooling="chained")
    torch.testing.assert_close(cells, published_chain(map_BDHW, (1, 2, 4)))


def test_chained_and_direct_differ_only_where_the_grid_does_not_divide_the_map():
    even, odd = random_map(8), random_map(7)
    chained = pool_cells(even, (1, 2, 4), pooling="chained")
    torch.testing.assert_close(chained, pool_cells(even, (1, 2, 4)))
    apart = pool_cells(odd, (1, 2, 4), pooling="chained") - pool_cells(odd, (1, 2, 4))
    assert apart.abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    map_BDHW = random_map(7).to(dtype)
    cells = pool_cells(map_BDHW, (1, 2, 4))
    assert cells.dtype == dtype
    torch.testing.assert_close(cells, pool_cells(map_BDHW.double(), (1, 2, 4)).to(dtype))


def test_the_gradient_is_that_of_means():
    map_BDHW = random_map(5, channels=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool_cells(x, (1, 2, 4)), map_BDHW)
