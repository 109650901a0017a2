"""Hard, mixed and smoothed labels as class distributions.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def label_targets(
    labels_B: Tensor,
    partner_labels_B: Tensor | None = None,
    weights_B: Tensor | None = None,
    *,
    num_classes: int,
    smoothing: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the class distribution that each label stands for, [B, C]; rows sum to 1.

    `(1 - smoothing) (w onehot(label) + (1 - w) onehot(partner)) + smoothing / C`.

    Args:
        labels_B: int64 class of each view.
        partner_labels_B: int64 class of the sample mixed into it; its own where unmixed.
        weights_B: share w of the own label in 0..1; given exactly when the partners are.
        num_classes: C.
        smoothing: probability spread evenly over all classes, the label's own included.
        dtype: of the result, float32 or wider.

    Source: Szegedy et al. 2016 (smoothing); Zhang et al. 2018 and Yun et al. 2019 (mixing).
    """
    assert (partner_labels_B is None) == (weights_B is None), "partners and weights come together"
    target_BC = one_hot(labels_B, num_classes).to(dtype)
    if partner_labels_B is not None and weights_B is not None:
        share_B1 = weights_B.to(dtype).unsqueeze(-1)
        partner_BC = one_hot(partner_labels_B, num_classes).to(dtype)
        target_BC = share_B1 * target_BC + (1.0 - share_B1) * partner_BC
    return (1.0 - smoothing) * target_BC + smoothing / num_classes


def majority_labels(labels_B: Tensor, partner_labels_B: Tensor, weights_B: Tensor) -> Tensor:
    """Return the class that holds most of each view, int64 [B]; the own label in a tie.

    Losses that ask for *the* target class (DKD, NKD, SDD, Tf-KD) are given this one for mixed
    views. The authors of NKD do the same (argmax of the mixed label); the others never mixed.
    """
    return torch.where(weights_B >= 0.5, labels_B, partner_labels_B)
