"""Teacher-free distillation: a virtual teacher that is nearly always right.

The other form, Tf-KD self, is `kd_loss` from a cache built from the student's own checkpoint.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from distill.losses.logspace import kl_rows, log_probabilities, widen


def virtual_teacher(
    labels_B: Tensor,
    *,
    num_classes: int,
    correct: float = 0.99,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return probability `correct` for the label and the rest spread evenly, [B, C].

    Args:
        labels_B: int64 target classes; for mixed views pass `majority_labels`.
        num_classes: C >= 2.
        correct: at least 0.9 in the paper, 0.99 in its code.
        dtype: of the result.
    """
    others = (1.0 - correct) / (num_classes - 1)
    return others + (correct - others) * one_hot(labels_B, num_classes).to(dtype)


def virtual_teacher_loss(
    logits_BC: Tensor, labels_B: Tensor, *, correct: float = 0.99, temperature: float = 20.0
) -> Tensor:
    """Return KL(softmax(u / T) || softmax(z)), u the virtual teacher, in nats, batch mean.

    Args:
        logits_BC: raw logits z.
        labels_B: int64 target classes; for mixed views pass `majority_labels`.
        correct: probability of the label in u.
        temperature: T > 0, of the teacher only.

    Source: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization",
    CVPR 2020, Tf-KD reg. The paper softens both sides; the code, followed here, takes the
    *probabilities* u as logits, divides only them by T, and has no T**2. Its weight: 0.9 CE + 0.1
    of this at T = 20 for ResNet-18 on CIFAR-100. It averages over classes and multiplies by 100
    there, which cancels at C = 100; elsewhere its weight is multiplier / C of this one's.
    """
    teacher_BC = virtual_teacher(
        labels_B, num_classes=logits_BC.shape[-1], correct=correct, dtype=widen(logits_BC).dtype
    )
    softened_BC = log_probabilities(teacher_BC, temperature=temperature)
    return kl_rows(softened_BC, log_probabilities(logits_BC)).mean()
