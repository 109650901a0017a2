"""Decodes recorded rows to teacher logits on the student's device.

Decoding uses the formulas of the codec with torch. Because rows are decoded on the device, only the
encoded arrays of the stored cells are transferred.
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
    """The operations that codecs need for decoding, in torch."""

    def float32(self, values: Tensor) -> Tensor:
        """Convert the values to float32."""
        return values.float()

    def scatter(self, fill: Tensor, width: int, index: Tensor, values: Tensor) -> Tensor:
        """Make a tensor [..., width] of `fill` [...] with `values` at `index` of its last axis."""
        dense = fill.unsqueeze(-1).expand(*fill.shape, width).clone()
        return dense.scatter_(-1, index.long(), values.float())


class TargetDecoder:
    """Decodes the rows of one cache.

    Attributes:
        spec: spec of the cache.
        scales: scales whose cells are decoded, in order.
        num_cells: number of cells of all scales.
        num_classes: number of classes of the teacher.
        array_names: names of the arrays that decoding needs.
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
        """Return teacher logits of every cell, float32 [B, R, C].

        `temperature` is the temperature of the softmax that follows. It affects only codecs that
        drop classes: the dropped classes get logits whose total probability at this temperature is
        correct.
        """
        how = Decoding(TorchMath(), self.num_classes, temperature)
        cells_BRX: Tensor = self.spec.codec.decode(rows, how)
        if self._expand_RS is not None:
            cells_BRX = torch.matmul(self._expand_RS, cells_BRX)
        if self._head is None:
            return cells_BRX
        # Average pooling and an affine head commute, so the narrower features are expanded instead
        # of the logits.
        weight_CD, bias_C = self._head
        return cells_BRX @ weight_CD.T + bias_C


def tensors_of(rows: Arrays, names: Sequence[str]) -> dict[str, Tensor]:
    """Convert the named arrays to tensors, for a decoder."""
    # Class indices are int64, because torch cannot index with uint16 and scatter needs int64.
    return {
        name: torch.from_numpy(
            rows[name].astype(np.int64) if name == "classes" else np.ascontiguousarray(rows[name])
        )
        for name in names
    }
