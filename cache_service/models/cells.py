"""Logits of the cells of the SDD grids, for any network that classifies the mean of a map.

A cell's logits are the network's own head, applied to the mean of the feature map over that cell.
Whether a network can answer this way is measured (`check_cells`), not looked up in a list.

Shape letters: B batch, R cells, C classes, D channels, H W sides of an image or map.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cache_service.models.heads import CellNet, answer_cells, require_logits
from cache_service.models.pooling import Pooling, pool_cells
from cache_service.models.probe import CellSupport, check_cells, linear_head

__all__ = [
    "CellNet",
    "CellSupport",
    "cell_features",
    "cell_logits",
    "check_cells",
    "linear_head",
    "pool_cells",
]


def cell_logits(
    model: nn.Module, images_B3HW: Tensor, scales: Sequence[int], *, pooling: Pooling = "direct"
) -> Tensor:
    """Logits of every cell, [B, R, C], from one run of the backbone. Differentiable.

    With scales (1,) this is the plain forward, which any network can do.

    Raises:
        UnsupportedError: the network has no single square map, or answers no plain logits.
    """
    if tuple(scales) == (1,):
        return require_logits(model, model(images_B3HW)).unsqueeze(1)
    logits_NC = answer_cells(
        model, images_B3HW, lambda map_BDHW: pool_cells(map_BDHW, scales, pooling=pooling)
    )
    return logits_NC.reshape(len(images_B3HW), -1, logits_NC.shape[1])


def cell_features(
    model: nn.Module, images_B3HW: Tensor, scales: Sequence[int], *, pooling: Pooling = "direct"
) -> Tensor:
    """Pooled features of every cell, [B, R, D].

    Where `linear_head` gives (W, b), the cell's logits are `W f + b`.
    """
    kept: list[Tensor] = []

    def pool(map_BDHW: Tensor) -> Tensor:
        kept.append(pool_cells(map_BDHW, scales, pooling=pooling))
        return kept[0]

    answer_cells(model, images_B3HW, pool)
    return kept[0]
