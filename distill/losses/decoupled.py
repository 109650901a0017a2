"""DKD and NKD: the target class separated from the others, each part with its own weight.

Shape letters: X any leading axes (B, or B and R), C classes. `labels_X` is the target class and
broadcasts against X; for mixed views pass `majority_labels`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from distill.losses.logspace import (
    cross_entropy_rows,
    kl_rows,
    log_probabilities,
    pick,
    refuse_other_shape,
    scale_logits,
    soft_kl_rows,
    without_target,
)

SoftClasses = Literal["others", "all"]
"""Classes of NKD's soft term. others: without the target, as the formula says. all: every class."""


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
    refuse_other_shape(student_logits_XC, teacher_logits_XC)
    student_X2 = _two_way(student_logits_XC, labels_X, temperature=temperature)
    teacher_X2 = _two_way(teacher_logits_XC.detach(), labels_X, temperature=temperature)
    return temperature**2 * kl_rows(teacher_X2, student_X2)


def nckd_rows(
    student_logits_XC: Tensor, teacher_logits_XC: Tensor, labels_X: Tensor, *, temperature: float
) -> Tensor:
    """Return T**2 KL of the distributions without the target class, [X], in nats."""
    refuse_other_shape(student_logits_XC, teacher_logits_XC)
    rows_X = soft_kl_rows(
        without_target(student_logits_XC, labels_X),
        without_target(teacher_logits_XC.detach(), labels_X),
        temperature=temperature,
    )
    return temperature**2 * rows_X


def dkd_rows(
    student_logits_XC: Tensor,
    teacher_logits_XC: Tensor,
    labels_X: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
    report: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return alpha TCKD + beta NCKD of each row, [X]; arguments as in `dkd_loss`."""
    rows = (student_logits_XC, teacher_logits_XC, labels_X)
    tckd_X = tckd_rows(*rows, temperature=temperature)
    nckd_X = nckd_rows(*rows, temperature=temperature)
    if report is not None:
        report.update(tckd=tckd_X.detach().mean(), nckd=nckd_X.detach().mean())
    return alpha * tckd_X + beta * nckd_X


def dkd_loss(
    student_logits_XC: Tensor,
    teacher_logits_XC: Tensor,
    labels_X: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    report: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return alpha TCKD + beta NCKD, each with its T**2, in nats, averaged over X.

    Plain distillation is TCKD + (1 - p_target) NCKD with the teacher's p_target at T: the NCKD
    part vanishes exactly where the teacher is certain. alpha and beta weigh both independently.

    `report` gets the unweighted means of TCKD and NCKD as `tckd` and `nckd`.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022; settings of mdistiller,
    where a warm-up over 20 epochs and a label loss of weight 1 go with it; beta is 8, 6 from vgg13
    and most pairs from wrn_40_2, 2 for resnet56 -> 20 and resnet110 -> 32. Departures: that code
    takes log(p_target), infinite once p underflows, and hides the target by subtracting 1000.
    """
    rows = (student_logits_XC, teacher_logits_XC, labels_X)
    tckd = tckd_rows(*rows, temperature=temperature).mean()
    nckd = nckd_rows(*rows, temperature=temperature).mean()
    if report is not None:
        report.update(tckd=tckd.detach(), nckd=nckd.detach())
    return alpha * tckd + beta * nckd


def nkd_rows(
    student_logits_XC: Tensor,
    teacher_logits_XC: Tensor,
    labels_X: Tensor,
    *,
    temperature: float,
    gamma: float,
    classes: SoftClasses = "others",
    teacher_at_1_XC: Tensor | None = None,
) -> Tensor:
    """Return the sum of both terms of NKD of each row, [X]; arguments as in `nkd_loss`."""
    refuse_other_shape(student_logits_XC, teacher_logits_XC)
    teacher_logits_XC = teacher_logits_XC.detach()
    whole_XC = teacher_logits_XC if teacher_at_1_XC is None else teacher_at_1_XC.detach()
    target_X = pick(log_probabilities(whole_XC), labels_X).exp() * pick(
        log_probabilities(student_logits_XC), labels_X
    )
    # A lookup, so that an unknown choice is an error and never one of the two.
    hides_target = {"others": True, "all": False}[classes]
    teacher_XC, student_XC = (
        without_target(logits_XC, labels_X) if hides_target else logits_XC
        for logits_XC in (teacher_logits_XC, student_logits_XC)
    )
    soft_X = cross_entropy_rows(
        log_probabilities(teacher_XC, temperature=temperature),
        log_probabilities(student_XC, temperature=temperature),
    )
    return gamma * temperature**2 * soft_X - target_X


def nkd_loss(
    student_logits_XC: Tensor,
    teacher_logits_XC: Tensor,
    labels_X: Tensor,
    *,
    temperature: float = 1.0,
    gamma: float = 1.5,
    classes: SoftClasses = "others",
    teacher_at_1_XC: Tensor | None = None,
) -> Tensor:
    """Return `-p_y log q_y - gamma T**2 sum_{c != y} p^_c log q^_c`, in nats, averaged over X.

    p and q are teacher and student at T = 1; p^ and q^ at T, renormalized without y. Both terms
    are cross-entropies, so the loss is not zero for equal logits. The label loss is not included.

    Args:
        classes: "all" keeps y in the second term, which is then T**2 times plain soft targets.
        teacher_at_1_XC: the teacher's logits for p_y, where those for T differ: a `topk` cache
            gives dropped classes logits that have the right joint weight at one temperature only.

    Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
    Approach with Normalized Loss", ICCV 2023, with its T = 1 and gamma = 1.5. Departure to know
    of: the first public version of its code built a mask that hides nothing (a scatter of 1 into
    ones, corrected to 0 later), and the SDD code copied that version for NKD and SD-NKD both. So
    the NKD and SD-NKD columns of the SDD tables were made with `classes="all"`.
    """
    return nkd_rows(
        student_logits_XC,
        teacher_logits_XC,
        labels_X,
        temperature=temperature,
        gamma=gamma,
        classes=classes,
        teacher_at_1_XC=teacher_at_1_XC,
    ).mean()
