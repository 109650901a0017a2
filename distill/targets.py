"""Encoded rows to teacher logits, on the device where the student is.

The codec's own formulas, run on torch. Decoding here keeps what travels to the device small:
float16 or bytes, and the stored cells only.
Shape letters: B batch, R cells, S stored cells, C classes, D channels, X classes or channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cache_service.format.cells import expand_matrix
from cache_service.format.codecs import ArrayMath, Arrays, Decoding, Head
from cache_service.format.layout import CacheLayout
from cache_service.format.spec import CacheSpec


class TorchMath(ArrayMath):
    """The same operations in torch."""

    def float32(self, values: Tensor) -> Tensor:
        """The values as float32."""
        return values.float()

    def scatter(self, fill: Tensor, width: int, index: Tensor, values: Tensor) -> Tensor:
        """A new tensor [..., width] of `fill` [...], `values` put at `index` of the last axis."""
        dense = fill.unsqueeze(-1).expand(*fill.shape, width).clone()
        return dense.scatter_(-1, index.long(), values.float())


class TargetDecoder:
    """Decodes the rows of one cache.

    Attributes:
        spec: the cache's.
        scales: grids whose cells come out, in order.
        num_cells: over all scales.
        num_classes: of the teacher.
        array_names: the arrays that decoding needs.
    """

    def __init__(self, spec: CacheSpec, head: Head | None, *, device: str) -> None:
        self.spec = spec
        self.scales = spec.scales
        self.num_cells = spec.num_cells
        self.num_classes = spec.teacher.num_classes
        self.array_names = CacheLayout(spec).target_names
        self._expand_RS: Tensor | None = None
        if spec.scales != spec.stored_scales:
            matrix = expand_matrix(spec.scales, spec.stored_scales)
            self._expand_RS = torch.from_numpy(matrix).to(device)
        self._head = None
        if head is not None:
            self._head = tuple(torch.from_numpy(part).to(device) for part in head)

    def logits(self, rows: dict[str, Tensor], *, temperature: float = 1.0) -> Tensor:
        """Teacher logits of every cell, float32 [B, R, C].

        `temperature` is the one the logits will be used at. It changes only what a codec that drops
        classes gives them, so that they have the right joint weight there.
        """
        how = Decoding(TorchMath(), self.num_classes, temperature)
        cells_BRX: Tensor = self.spec.codec.decode(rows, how)
        if self._expand_RS is not None:
            cells_BRX = torch.matmul(self._expand_RS, cells_BRX)
        if self._head is None:
            return cells_BRX
        # Pooling and an affine head commute: the narrow features are expanded, not the logits.
        weight_CD, bias_C = self._head
        return cells_BRX @ weight_CD.T + bias_C


def tensors_of(rows: Arrays, names: Sequence[str]) -> dict[str, Tensor]:
    """The arrays of these names as tensors, for a decoder."""
    # torch indexes with neither uint16 nor uint32; int64 is what scatter wants anyway
    return {
        name: torch.from_numpy(
            rows[name].astype(np.int64) if name == "classes" else np.ascontiguousarray(rows[name])
        )
        for name in names
    }
