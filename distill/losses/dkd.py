"""Decoupled distillation: the target against the rest, and the rest among themselves.

Shape letters: X any leading axes (B, or B and R), C classes. `labels_X` is the target class and
broadcasts against X; for mixed views pass `majority_labels`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from distill.losses.logspace import (
    kl_rows,
    log_probabilities,
    pick,
    scale_logits,
    without_target,
)


def _two_way(logits_XC: Tensor, labels_X: Tensor, *, temperature: float) -> Tensor:
    """Return the logs of (p_target, 1 - p_target) at T, [X, 2].

    Both are log-sigmoids of one margin, so neither is lost where the other one rounds to 1.
    """
    scaled_XC = scale_logits(logits_XC, temperature=temperature)
    rest_X = without_target(scaled_XC, labels_X).logsumexp(dim=-1)
    margin_X = pick(scaled_XC, labels_X) - rest_X
    return torch.stack([logsigmoid(margin_X), logsigmoid(-margin_X)], dim=-1)


def tckd_rows(
    student_logits_XC: Tensor, teacher_logits_XC: Tensor, labels_X: Tensor, *, temperature: float
) -> Tensor:
    """Return T**2 KL of the (target, rest) distributions, teacher || student, [X], in nats."""
    student_X2 = _two_way(student_logits_XC, labels_X, temperature=temperature)
    teacher_X2 = _two_way(teacher_logits_XC.detach(), labels_X, temperature=temperature)
    return temperature**2 * kl_rows(teacher_X2, student_X2)


def nckd_rows(
    student_logits_XC: Tensor, teacher_logits_XC: Tensor, labels_X: Tensor, *, temperature: float
) -> Tensor:
    """Return T**2 KL of the distributions without the target class, [X], in nats."""
    student_XC = log_probabilities(
        without_target(student_logits_XC, labels_X), temperature=temperature
    )
    teacher_XC = log_probabilities(
        without_target(teacher_logits_XC.detach(), labels_X), temperature=temperature
    )
    return temperature**2 * kl_rows(teacher_XC, student_XC)


def dkd_rows(
    student_logits_XC: Tensor,
    teacher_logits_XC: Tensor,
    labels_X: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """Return alpha TCKD + beta NCKD of each row, [X]; see `dkd_loss`."""
    rows = (student_logits_XC, teacher_logits_XC, labels_X)
    return alpha * tckd_rows(*rows, temperature=temperature) + beta * nckd_rows(
        *rows, temperature=temperature
    )


def dkd_loss(
    student_logits_XC: Tensor,
    teacher_logits_XC: Tensor,
    labels_X: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Return alpha TCKD + beta NCKD, each with its T**2, in nats, averaged over X.

    Plain distillation is TCKD + (1 - p_target) NCKD with the teacher's p_target at T: it mutes
    the rest exactly where the teacher is sure, and alpha and beta give it its own weight.

    Args:
        student_logits_XC: raw logits.
        teacher_logits_XC: raw logits of the same views; taken as constants.
        labels_X: int64 target classes.
        temperature: T > 0.
        alpha: weight of the target's share.
        beta: weight of the rest; published 8, 6 from vgg13 and most pairs from wrn_40_2, 2 for
            resnet56 -> 20 and resnet110 -> 32.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022; settings of mdistiller,
    where a warm-up over 20 epochs and a label loss of weight 1 go with it. Departures: that code
    takes log(p_target), infinite once p underflows, and hides the target by subtracting 1000.
    """
    return dkd_rows(
        student_logits_XC,
        teacher_logits_XC,
        labels_X,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
    ).mean()
