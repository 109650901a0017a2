"""Normalized distillation: the teacher's weight on the target, plus the rest renormalized.

Shape letters: X any leading axes (B, or B and R), C classes. `labels_X` is the target class and
broadcasts against X; for mixed views pass `majority_labels`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.losses.logspace import cross_entropy_rows, log_probabilities, pick, without_target

SoftClasses = Literal["others", "all"]
"""Classes of the soft term. others: without the target, as the formula says. all: every class."""


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
    """Return the two terms of NKD added up, for each row, [X]; see `nkd_loss`.

    `teacher_at_1_XC` are the teacher's logits for p_y, where those for T are other ones: a `topk`
    cache gives dropped classes what has the right weight at one temperature only.
    """
    teacher_logits_XC = teacher_logits_XC.detach()
    whole_XC = teacher_logits_XC if teacher_at_1_XC is None else teacher_at_1_XC.detach()
    target_X = pick(log_probabilities(whole_XC), labels_X).exp() * pick(
        log_probabilities(student_logits_XC), labels_X
    )
    student_XC, teacher_XC = {
        "others": lambda: (
            without_target(student_logits_XC, labels_X),
            without_target(teacher_logits_XC, labels_X),
        ),
        "all": lambda: (student_logits_XC, teacher_logits_XC),
    }[classes]()
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
    are cross-entropies, so the loss is not zero for equal logits. The label loss comes on top.

    Args:
        student_logits_XC: raw logits.
        teacher_logits_XC: raw logits of the same views; taken as constants.
        labels_X: int64 target classes y.
        temperature: T > 0 of the second term only.
        gamma: weight of the second term.
        classes: "all" keeps y in the second term, which is then T**2 times plain soft targets.
        teacher_at_1_XC: the teacher's logits for p_y, where those for T are other ones.

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
