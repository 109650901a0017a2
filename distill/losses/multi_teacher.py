"""Several teachers: averaged into one, or each matched by a head that is shared or its own.

Shape letters: X any leading axes, N teachers, B batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from distill.losses.kd import Direction, kd_loss
from distill.losses.logspace import log_probabilities, pick

EnsembleMean = Literal["arithmetic", "geometric"]
"""arithmetic: of the members' probabilities at T. geometric: of their logits."""


def ensemble_log_probabilities(
    teacher_logits: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    mean: EnsembleMean = "arithmetic",
) -> Tensor:
    """Return the log-probabilities at T of the averaged teachers, [X, C], in nats.

    The arithmetic mean is taken at T, so it depends on T beyond scaling. The geometric mean gives
    a class little where any member gives it little.

    Source: Hinton et al. 2015, section 1, which allows for both.
    """
    log_p_NXC = torch.stack(
        [log_probabilities(logits_XC, temperature=temperature) for logits_XC in teacher_logits]
    )
    # A lookup, so that an unknown mean is an error and never one of the two.
    return {
        "arithmetic": lambda: log_p_NXC.logsumexp(dim=0) - math.log(len(teacher_logits)),
        "geometric": lambda: log_softmax(log_p_NXC.mean(dim=0), dim=-1),
    }[mean]()


def ensemble_logits(
    teacher_logits: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    mean: EnsembleMean = "arithmetic",
) -> Tensor:
    """Return logits [X, C] whose softmax at this same T is that of the averaged teachers.

    They serve as a teacher's logits for any loss that runs at this T. Arguments as in
    `ensemble_log_probabilities`.
    """
    return temperature * ensemble_log_probabilities(
        teacher_logits, temperature=temperature, mean=mean
    )


def _heads_by_teacher(student_heads: Sequence[Tensor], num_teachers: int) -> Sequence[Tensor]:
    """Return one head for each teacher; a single head is used for all of them."""
    return list(student_heads) * num_teachers if len(student_heads) == 1 else student_heads


def multi_teacher_soft_loss(
    student_heads: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    *,
    temperature: float = 3.0,
    direction: Direction = "forward",
) -> Tensor:
    """Return T**2 / N sum_i KL(teacher_i || head_i) at T, in nats, averaged over the batch.

    Heads are one that is shared by all teachers, or as many as there are teachers, in their order.

    Raises:
        ValueError: from `zip`, if there are several heads but not N.

    Source: Touvron et al., "Training data-efficient image transformers", ICML 2021, with N
    teachers; T = 3 goes with a weight of 0.1. Departure: DeiT's code divides by B * C where this
    divides by B, so its weight is this one's times C.
    """
    heads = _heads_by_teacher(student_heads, len(teacher_logits))
    losses = [
        kd_loss(head_BC, teacher_BC, temperature=temperature, direction=direction)
        for head_BC, teacher_BC in zip(heads, teacher_logits, strict=True)
    ]
    return torch.stack(losses).mean()


def multi_teacher_hard_loss(
    student_heads: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Return 1 / N sum_i CE(head_i / T, argmax teacher_i), in nats, averaged over the batch.

    Heads and teachers as in `multi_teacher_soft_loss`. There is no T**2, as in the formula: hard
    labels do not soften with T, so T only divides the student's own logits.

    Source: Touvron et al. 2021, with N teachers; T = 1 and a weight of 0.5 there.
    """
    heads = _heads_by_teacher(student_heads, len(teacher_logits))
    losses = [
        -pick(log_probabilities(head_BC, temperature=temperature), teacher_BC.argmax(-1)).mean()
        for head_BC, teacher_BC in zip(heads, teacher_logits, strict=True)
    ]
    return torch.stack(losses).mean()
