"""Soft targets, logit matching and logit standardization: one teacher, the whole image.

Shape letters: X any leading axes (B, or B and R), C classes.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from cache_service.errors import ConfigError
from distill.losses.logspace import (
    kl_rows,
    log_probabilities,
    refuse_other_shape,
    scale_logits,
    soft_kl_rows,
    widen,
)

Direction = Literal["forward", "reverse"]
"""forward: KL(teacher || student), covers the teacher. reverse: KL(student || teacher)."""

EPS = 1e-7
"""Added to the standard deviation of logits, as published; rows of equal logits become zeros."""


def kd_rows(
    student_logits_XC: Tensor,
    teacher_logits_XC: Tensor,
    *,
    temperature: float,
    direction: Direction = "forward",
) -> Tensor:
    """Return T**2 times the KL at temperature T of each row, [X]; see `kd_loss`."""
    refuse_other_shape(student_logits_XC, teacher_logits_XC)
    if direction not in get_args(Direction):
        raise ConfigError(f"direction is forward or reverse, got {direction!r}.")
    if direction == "forward":
        rows_X = soft_kl_rows(student_logits_XC, teacher_logits_XC, temperature=temperature)
        return temperature**2 * rows_X
    student_XC = log_probabilities(student_logits_XC, temperature=temperature)
    teacher_XC = log_probabilities(teacher_logits_XC.detach(), temperature=temperature)
    return temperature**2 * kl_rows(student_XC, teacher_XC)


def kd_loss(
    student_logits_XC: Tensor,
    teacher_logits_XC: Tensor,
    *,
    temperature: float = 4.0,
    direction: Direction = "forward",
) -> Tensor:
    """Return T**2 KL(teacher || student) at temperature T, in nats, averaged over X.

    `direction="reverse"` gives T**2 KL(student || teacher), which is mode-seeking. T**2 keeps the
    size of the gradient as T changes. As T grows the loss tends to half of `logit_matching_loss`
    and its gradient, per sample, to (z - v) / C with zero-mean logits z and v.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. T = 4 is
    the value of the CIFAR-100 tables of RepDistiller and mdistiller.
    """
    return kd_rows(
        student_logits_XC, teacher_logits_XC, temperature=temperature, direction=direction
    ).mean()


def logit_matching_loss(student_logits_XC: Tensor, teacher_logits_XC: Tensor) -> Tensor:
    """Return the mean squared difference of zero-mean logits, in squared logits.

    The mean of each row is subtracted first, because softmax does not depend on it. The result is
    averaged over X and C.

    Source: Hinton et al. 2015, section 2.1, the limit of high temperature. They write 1/2 of the
    squared difference summed over classes; the constants belong to the weight.
    """
    refuse_other_shape(student_logits_XC, teacher_logits_XC)
    gap_XC = widen(student_logits_XC) - widen(teacher_logits_XC.detach())
    return (gap_XC - gap_XC.mean(dim=-1, keepdim=True)).square().mean()


def standardize_logits(logits_XC: Tensor, *, eps: float = EPS) -> Tensor:
    """Return the z-score of each row, [X, C], in standard deviations; float32 or wider.

    Given to any loss in place of raw logits, on both sides, it leaves the student free in the
    offset and scale of its logits. Gradients flow through mean and standard deviation.

    Source: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024. The standard
    deviation divides by C - 1, as in its code, where a base temperature of 2 and a soft weight of
    9 go with it.
    """
    shifted_XC = scale_logits(logits_XC, temperature=1.0)
    centered_XC = shifted_XC - shifted_XC.mean(dim=-1, keepdim=True)
    return centered_XC / (eps + shifted_XC.std(dim=-1, keepdim=True))
