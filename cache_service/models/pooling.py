"""Means of a feature map over the cells of the SDD grids.

Shape letters: B batch, R cells, D channels, H W map sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["direct", "chained"]


def pool_cells(map_BDHW: Tensor, scales: Sequence[int], *, pooling: Pooling = "direct") -> Tensor:
    """Means of the map over the cells of all scales, [B, R, D], in the map's dtype.

    The windows are those of adaptive average pooling: they overlap by a pixel where the side does
    not divide the map's, and repeat where it exceeds it. Means are taken in float32 at least.

    Args:
        map_BDHW: feature map.
        scales: grid sides, in the order wanted.
        pooling: `direct` pools every scale from the map; `chained` pools the last (finest) one
            from the map and the others from that grid.

    Source: Wei et al., Scale Decoupled Distillation, CVPR 2024; `chained` is what the published
    code does with 4 as the finest side (it pools 4 x 4 first whatever the scales are), and differs
    from `direct` where the finest side does not divide the map's.
    """
    source = map_BDHW if pooling == "direct" else _pool_grid(map_BDHW, scales[-1])
    cells_BDR = torch.cat([_pool_grid(source, side).flatten(2) for side in scales], dim=2)
    return cells_BDR.transpose(1, 2).to(map_BDHW.dtype)


def _pool_grid(map_BDHW: Tensor, side: int) -> Tensor:
    """Adaptive mean pooling to [B, D, side, side].

    Written with plain means because the gradient of torch's adaptive pooling is not deterministic
    on GPUs.
    """
    if side == 1:
        # The very reduction that networks do themselves, so that cell 0 is their own answer.
        return map_BDHW.mean((2, 3), keepdim=True, dtype=_sum_dtype(map_BDHW))
    return _pool_axis(_pool_axis(map_BDHW, 2, side), 3, side)


def _pool_axis(map_BDHW: Tensor, axis: int, side: int) -> Tensor:
    dtype, length = _sum_dtype(map_BDHW), map_BDHW.shape[axis]
    if length % side == 0:
        shape = map_BDHW.shape
        blocks = map_BDHW.reshape(*shape[:axis], side, length // side, *shape[axis + 1 :])
        return blocks.mean(axis + 1, dtype=dtype)
    edges = [(i * length // side, -(-(i + 1) * length // side)) for i in range(side)]
    windows = [map_BDHW.narrow(axis, start, stop - start) for start, stop in edges]
    return torch.stack([window.mean(axis, dtype=dtype) for window in windows], dim=axis)


def _sum_dtype(map_BDHW: Tensor) -> torch.dtype:
    """A mean in two steps must not round to half precision between them."""
    return torch.promote_types(map_BDHW.dtype, torch.float32)
