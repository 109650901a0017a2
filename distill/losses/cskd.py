"""Class-wise self-distillation: another sample of the same class gives the soft target.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

from torch import Tensor

from distill.losses.soft_targets import kd_loss


def cskd_loss(logits_BC: Tensor, pair_logits_BC: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Return T**2 KL(pair || sample) at T, in nats, averaged over the batch.

    Args:
        logits_BC: raw logits of each sample.
        pair_logits_BC: raw logits, by the same network, of another sample of the same class in
            each row. Constants: no gradient reaches them, so they may be computed without.
        temperature: T > 0.

    Source: Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation",
    CVPR 2020, and its code: T = 4, weight 1, label loss of weight 1 on `logits_BC` only, so half
    of the images in a batch of pairs get no label loss.
    """
    return kd_loss(logits_BC, pair_logits_BC, temperature=temperature)
