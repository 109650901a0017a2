"""Hard, mixed and smoothed labels as class distributions, and the cross-entropy against them.

Shape letters: X any leading axes, B batch, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.losses.logspace import log_probabilities, pick


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
        weights_B: weight w of the own label in 0..1; given exactly when the partners are.
        num_classes: C.
        smoothing: probability spread evenly over all classes, the label's own included.
        dtype: of the result, float32 or wider.

    Source: Szegedy et al. 2016 (smoothing); Zhang et al. 2018 and Yun et al. 2019 (mixing).
    """
    assert (partner_labels_B is None) == (weights_B is None), "partners and weights come together"
    target_BC = _one_hot(labels_B, num_classes, dtype)
    if partner_labels_B is not None and weights_B is not None:
        weight_B1 = weights_B.to(dtype).unsqueeze(-1)
        partner_BC = _one_hot(partner_labels_B, num_classes, dtype)
        target_BC = weight_B1 * target_BC + (1.0 - weight_B1) * partner_BC
    return (1.0 - smoothing) * target_BC + smoothing / num_classes


def _one_hot(labels_B: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    # torch's own goes through int64, twice the memory, and reads the largest label on a CPU.
    zeros_BC = torch.zeros((*labels_B.shape, num_classes), dtype=dtype, device=labels_B.device)
    return zeros_BC.scatter_(-1, labels_B.unsqueeze(-1), 1.0)


def majority_labels(labels_B: Tensor, partner_labels_B: Tensor, weights_B: Tensor) -> Tensor:
    """Return the class with the larger weight in each view, int64 [B]; the own label in a tie.

    Losses that require *the* target class (DKD, NKD, SDD, Tf-KD) get this one for mixed views. The
    code of NKD does the same (argmax of the mixed label); the other papers never mixed.
    """
    return torch.where(weights_B >= 0.5, labels_B, partner_labels_B)


def soft_cross_entropy(logits_XC: Tensor, targets_XC: Tensor) -> Tensor:
    """Return -sum targets * log softmax(logits), in nats, averaged over X.

    Targets are class distributions whose rows sum to 1, taken as constants.
    """
    return -(targets_XC.detach() * log_probabilities(logits_XC)).sum(dim=-1).mean()


def label_loss(
    logits_BC: Tensor,
    labels_B: Tensor,
    partner_labels_B: Tensor | None = None,
    weights_B: Tensor | None = None,
    *,
    smoothing: float = 0.0,
) -> Tensor:
    """Return the cross-entropy against hard, mixed or smoothed labels, in nats.

    It is `soft_cross_entropy` of `label_targets`, but looks up the classes that have weight, which
    takes half of the time at 21841 classes.
    """
    assert (partner_labels_B is None) == (weights_B is None), "partners and weights come together"
    log_p_BC = log_probabilities(logits_BC)
    gained_B = pick(log_p_BC, labels_B)
    if partner_labels_B is not None and weights_B is not None:
        weights_B = weights_B.to(log_p_BC.dtype)
        partner_B = pick(log_p_BC, partner_labels_B)
        gained_B = weights_B * gained_B + (1.0 - weights_B) * partner_B
    if smoothing:
        gained_B = (1.0 - smoothing) * gained_B + smoothing * log_p_BC.mean(dim=-1)
    return -gained_B.mean()
