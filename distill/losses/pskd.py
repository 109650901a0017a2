"""Progressive self-distillation: the student's answers of an epoch ago soften the labels.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import math

from torch import Tensor

from distill.losses.logspace import log_probabilities
from distill.losses.soft_targets import soft_cross_entropy


def pskd_alpha(epoch: float, *, epochs: int, final: float = 0.8) -> float:
    """Return the weight of the previous answers: `final * t / epochs`, one value per epoch.

    Args:
        epoch: fractional, 0.0 at the start of training; t = floor(epoch) + 1, at most `epochs`.
        epochs: length of training.
        final: the weight in the last epoch.

    Source: Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV
    2021, and its code.
    """
    return final * min(math.floor(epoch) + 1, epochs) / epochs


def soften_targets(targets_BC: Tensor, previous_logits_BC: Tensor, *, alpha: float) -> Tensor:
    """Return `(1 - alpha) targets + alpha softmax(previous)`, [B, C]; rows sum to 1.

    Args:
        targets_BC: class distributions of the views, from `label_targets`.
        previous_logits_BC: this student's raw logits of the same samples, an epoch ago.
        alpha: 0..1. In the first epoch there is no previous answer: pass 0, with any finite logits.
    """
    previous_BC = log_probabilities(previous_logits_BC.detach()).exp()
    return (1.0 - alpha) * targets_BC + alpha * previous_BC


def pskd_loss(
    logits_BC: Tensor, targets_BC: Tensor, previous_logits_BC: Tensor, *, alpha: float
) -> Tensor:
    """Return the cross-entropy against the softened labels, in nats, averaged over the batch.

    Arguments as in `soften_targets`. T = 1 throughout, and no other label loss is added.

    Source: Kim et al. 2021; their code starts from the labels themselves as previous answers,
    which is alpha = 0 in the first epoch.
    """
    return soft_cross_entropy(
        logits_BC, soften_targets(targets_BC, previous_logits_BC, alpha=alpha)
    )
