"""Soft targets, logit matching and the label loss: what every other method is built from.

Shape letters: X any leading axes (B, or B and R), B batch, C classes.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.losses.labels import label_targets
from distill.losses.logspace import kl_rows, log_probabilities, widen

Direction = Literal["forward", "reverse"]
"""forward: KL(teacher || student), covers the teacher. reverse: KL(student || teacher)."""


def kd_rows(
    student_logits_XC: Tensor,
    teacher_logits_XC: Tensor,
    *,
    temperature: float,
    direction: Direction = "forward",
) -> Tensor:
    """Return T**2 times the KL at temperature T of each row, [X]; see `kd_loss`."""
    student_XC = log_probabilities(student_logits_XC, temperature=temperature)
    teacher_XC = log_probabilities(teacher_logits_XC.detach(), temperature=temperature)
    order = {"forward": (teacher_XC, student_XC), "reverse": (student_XC, teacher_XC)}
    return temperature**2 * kl_rows(*order[direction])


def kd_loss(
    student_logits_XC: Tensor,
    teacher_logits_XC: Tensor,
    *,
    temperature: float = 4.0,
    direction: Direction = "forward",
) -> Tensor:
    """Return T**2 KL(teacher || student) at temperature T, in nats, averaged over X.

    T**2 keeps the gradient's size as T changes. As T grows the loss tends to half of
    `logit_matching_loss` and its gradient, per sample, to (z - v) / C with zero-mean logits.

    Args:
        student_logits_XC: raw logits z, any float type.
        teacher_logits_XC: raw logits v of the same views; taken as constants.
        temperature: T > 0.
        direction: "reverse" gives T**2 KL(student || teacher), which seeks one mode.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. T = 4 is
    the value of the CIFAR-100 tables of RepDistiller and mdistiller.
    """
    return kd_rows(
        student_logits_XC, teacher_logits_XC, temperature=temperature, direction=direction
    ).mean()


def logit_matching_loss(student_logits_XC: Tensor, teacher_logits_XC: Tensor) -> Tensor:
    """Return the mean squared difference of zero-mean logits, in squared logits.

    Each row's mean is taken off first, because softmax cannot see it. The mean runs over X and C.

    Source: Hinton et al. 2015, section 2.1, the limit of high temperature. They write 1/2 of the
    squared difference summed over classes; the constants belong to the weight.
    """
    gap_XC = widen(student_logits_XC) - widen(teacher_logits_XC.detach())
    return (gap_XC - gap_XC.mean(dim=-1, keepdim=True)).square().mean()


def soft_cross_entropy(logits_XC: Tensor, targets_XC: Tensor) -> Tensor:
    """Return -sum targets * log softmax(logits), in nats, averaged over X.

    Args:
        logits_XC: raw logits.
        targets_XC: class distributions, taken as constants; rows sum to 1.
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

    Args:
        logits_BC: raw logits.
        labels_B: int64 class of each view.
        partner_labels_B: int64 class of the sample mixed into it; its own where unmixed.
        weights_B: share of the own label; given exactly when the partners are.
        smoothing: probability spread evenly over all classes.
    """
    targets_BC = label_targets(
        labels_B,
        partner_labels_B,
        weights_B,
        num_classes=logits_BC.shape[-1],
        smoothing=smoothing,
        dtype=widen(logits_BC).dtype,
    )
    return soft_cross_entropy(logits_BC, targets_BC)
