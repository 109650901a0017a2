"""DIST: match the teacher's correlations between and within classes, not its exact values.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.losses.logspace import log_probabilities, refuse_other_shape

EPS = 1e-8
"""Added to the product of two norms, as published. Rows and columns whose norm is well under 1e-4,
such as classes that are improbable in a whole batch, thus count as uncorrelated and have a small
gradient."""


def pearson(a: Tensor, b: Tensor, *, dim: int, eps: float = EPS) -> Tensor:
    """Return Pearson's correlation of `a` and `b` along `dim`, which is dropped."""
    a = a - a.mean(dim=dim, keepdim=True)
    b = b - b.mean(dim=dim, keepdim=True)
    norm_a: Tensor = torch.linalg.vector_norm(a, dim=dim)
    norm_b: Tensor = torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim=dim) / (norm_a * norm_b + eps)


def _correlation_loss(
    student_BC: Tensor, teacher_BC: Tensor, temperature: float, *, dim: int
) -> Tensor:
    refuse_other_shape(student_BC, teacher_BC)
    q_BC = log_probabilities(student_BC, temperature=temperature).exp()
    p_BC = log_probabilities(teacher_BC.detach(), temperature=temperature).exp()
    return temperature**2 * (1.0 - pearson(q_BC, p_BC, dim=dim)).mean()


def inter_class_loss(
    student_logits_BC: Tensor, teacher_logits_BC: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return T**2 (1 - correlation over each sample's classes), batch mean; see `dist_loss`."""
    return _correlation_loss(student_logits_BC, teacher_logits_BC, temperature, dim=1)


def intra_class_loss(
    student_logits_BC: Tensor, teacher_logits_BC: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return T**2 (1 - correlation over the batch of each class), class mean; see `dist_loss`."""
    return _correlation_loss(student_logits_BC, teacher_logits_BC, temperature, dim=0)


def dist_terms(
    student_logits_BC: Tensor,
    teacher_logits_BC: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the weighted terms `beta * inter` and `gamma * intra` of `dist_loss`."""
    logits = (student_logits_BC, teacher_logits_BC)
    return (
        beta * inter_class_loss(*logits, temperature=temperature),
        gamma * intra_class_loss(*logits, temperature=temperature),
    )


def dist_loss(
    student_logits_BC: Tensor,
    teacher_logits_BC: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """Return beta * inter + gamma * intra; without a unit, 0 for equal logits.

    inter correlates the classes of each sample, intra the samples of each class, both with T**2.
    intra needs batches of several samples: of a single one every column is constant, and the term
    stays at T**2.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, with the
    T**2, the eps and the default weights of its code, which the paper does not mention.
    """
    inter, intra = dist_terms(
        student_logits_BC, teacher_logits_BC, temperature=temperature, beta=beta, gamma=gamma
    )
    return inter + intra
