"""Deep mutual learning: students that train on the same batches and match each other.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.losses.kd import kd_loss
from distill.losses.labels import label_loss
from distill.losses.logspace import widen


def peer_match_loss(
    logits_BC: Tensor, other_logits: Sequence[Tensor], *, temperature: float = 1.0
) -> Tensor:
    """Return the mean over the others of T**2 KL(other || this one), in nats; 0 with no others.

    Its gradient is that of one teacher whose probabilities are the arithmetic mean of the
    others'; the values differ by how much the others disagree.

    The others' logits [B, C] are constants.
    """
    if not other_logits:
        return widen(logits_BC).new_zeros(())
    losses = [kd_loss(logits_BC, other_BC, temperature=temperature) for other_BC in other_logits]
    return torch.stack(losses).mean()


def peer_losses(
    student_logits: Sequence[Tensor],
    labels_B: Tensor,
    partner_labels_B: Tensor | None = None,
    weights_B: Tensor | None = None,
    *,
    temperature: float = 1.0,
    peer_weight: float = 1.0,
    smoothing: float = 0.0,
) -> tuple[Tensor, ...]:
    """Return label loss + peer_weight * match of each student, in their order, in nats.

    The gradient of each loss reaches its own student only, so their sum may be backpropagated.

    Labels and smoothing are those of `label_loss`.

    Source: Zhang et al., "Deep Mutual Learning", CVPR 2018; T = 1, weight 1. Departure: they
    update the students in turn, each against the others' new logits; here all update at once.
    """
    return tuple(
        label_loss(own_BC, labels_B, partner_labels_B, weights_B, smoothing=smoothing)
        + peer_weight
        * peer_match_loss(
            own_BC,
            [*student_logits[:index], *student_logits[index + 1 :]],
            temperature=temperature,
        )
        for index, own_BC in enumerate(student_logits)
    )
