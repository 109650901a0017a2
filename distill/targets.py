"""Encoded rows to teacher logits, on the device where the student is.

The same formulas as `cache_service.format.codecs` in numpy, which tests hold these to. Decoding
here keeps what travels to the device small: float16 or bytes, and the stored cells only.
Shape letters: B batch, R cells, S stored cells, C classes, K kept classes, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cache_service.format.cells import expand_matrix
from cache_service.format.codecs import Head
from cache_service.format.layout import row_arrays
from cache_service.format.spec import CacheSpec, DenseCodec, FeaturesCodec, Int8Codec

_IDENTITY = ("sample", "digest", "origin")


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
        self.array_names = tuple(a.name for a in row_arrays(spec) if a.name not in _IDENTITY)
        self._expand_RS: Tensor | None = None
        if spec.scales != spec.stored_scales:
            matrix = expand_matrix(spec.scales, spec.stored_scales)
            self._expand_RS = torch.from_numpy(matrix).to(device)
        self._head = None
        if head is not None:
            self._head = tuple(torch.from_numpy(part).to(device) for part in head)

    def logits(self, rows: dict[str, Tensor], *, temperature: float = 1.0) -> Tensor:
        """Teacher logits of every cell, float32 [B, R, C].

        `temperature` is the one the logits will be used at. It changes only what dropped classes of
        a `topk` cache are given, so that they have the right joint weight there.
        """
        codec = self.spec.codec
        if isinstance(codec, FeaturesCodec):
            # Pooling and an affine head commute: expand the narrow features, not the logits.
            features_BRD = self._expanded(rows["features"].float())
            assert self._head is not None
            weight_CD, bias_C = self._head
            return features_BRD @ weight_CD.T + bias_C
        if isinstance(codec, DenseCodec):
            stored_BSC = rows["logits"].float()
        elif isinstance(codec, Int8Codec):
            scale_BS1, offset_BS1 = rows["scale"].unsqueeze(-1), rows["offset"].unsqueeze(-1)
            stored_BSC = rows["logits"].float() * scale_BS1 + offset_BS1
        else:
            stored_BSC = self._topk(rows, temperature)
        return self._expanded(stored_BSC)

    def _expanded(self, stored_BSX: Tensor) -> Tensor:
        if self._expand_RS is None:
            return stored_BSX
        return torch.matmul(self._expand_RS, stored_BSX)

    def _topk(self, rows: dict[str, Tensor], temperature: float) -> Tensor:
        mean_BS, lme_BS, half_BS = rows["tail_mean"], rows["tail_lme"], rows["tail_var"] / 2
        third_BS = lme_BS - mean_BS - half_BS
        fitted_BS = mean_BS + half_BS / temperature + third_BS / temperature**2
        low_BS, high_BS = (mean_BS, lme_BS) if temperature >= 1 else (lme_BS, rows["tail_max"])
        fill_BS1 = torch.clamp(fitted_BS, low_BS, high_BS).unsqueeze(-1)
        dense_BSC = fill_BS1.expand(*mean_BS.shape, self.num_classes).clone()
        return dense_BSC.scatter_(-1, rows["classes"].long(), rows["values"].float())
