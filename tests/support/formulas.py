"""The methods' formulas in float64, from probabilities and with the classes really left out."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.batches import Batch


def softmax(logits_XC: Tensor, temperature: float = 1.0) -> Tensor:
    weights_XC = torch.exp(logits_XC.double() / temperature)
    return weights_XC / weights_XC.sum(-1, keepdim=True)


def kl(p_XC: Tensor, q_XC: Tensor) -> Tensor:
    return (p_XC * (p_XC / q_XC).log()).sum(-1)


def kd(student_XC: Tensor, teacher_XC: Tensor, temperature: float) -> Tensor:
    return temperature**2 * kl(softmax(teacher_XC, temperature), softmax(student_XC, temperature))


def others(values_XC: Tensor, labels_X: Tensor) -> Tensor:
    """The values without each row's label, [X, C - 1]."""
    rows = [
        [value for place, value in enumerate(row) if place != label]
        for row, label in zip(
            values_XC.flatten(0, -2).tolist(), labels_X.flatten().tolist(), strict=True
        )
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(*labels_X.shape, -1)


def own(values_XC: Tensor, labels_X: Tensor) -> Tensor:
    return values_XC.gather(-1, labels_X.unsqueeze(-1)).squeeze(-1)


def tckd(student_XC: Tensor, teacher_XC: Tensor, labels_X: Tensor, temperature: float) -> Tensor:
    def two_way(logits_XC):
        p_X = own(softmax(logits_XC, temperature), labels_X)
        return torch.stack([p_X, 1 - p_X], dim=-1)

    return temperature**2 * kl(two_way(teacher_XC), two_way(student_XC))


def nckd(student_XC: Tensor, teacher_XC: Tensor, labels_X: Tensor, temperature: float) -> Tensor:
    return kd(others(student_XC, labels_X), others(teacher_XC, labels_X), temperature)


def nkd(
    student_XC: Tensor,
    teacher_XC: Tensor,
    labels_X: Tensor,
    temperature: float,
    gamma: float,
    classes: str,
) -> Tensor:
    target_X = own(softmax(teacher_XC), labels_X) * own(softmax(student_XC), labels_X).log()
    if classes == "others":
        student_XC, teacher_XC = others(student_XC, labels_X), others(teacher_XC, labels_X)
    p_XC, q_XC = softmax(teacher_XC, temperature), softmax(student_XC, temperature)
    return -target_X - gamma * temperature**2 * (p_XC * q_XC.log()).sum(-1)


def label(logits_BC: Tensor, batch: Batch) -> Tensor:
    log_p_BC = softmax(logits_BC).log()
    share_B = batch.weights_B.double()
    own_B, partner_B = own(log_p_BC, batch.labels_B), own(log_p_BC, batch.partner_labels_B)
    return -(share_B * own_B + (1 - share_B) * partner_B).mean()


def larger_part(batch: Batch) -> Tensor:
    labels = zip(
        batch.labels_B.tolist(),
        batch.partner_labels_B.tolist(),
        batch.weights_B.tolist(),
        strict=True,
    )
    return torch.tensor([mine if share >= 0.5 else other for mine, other, share in labels])


def pearson(a_XC: Tensor, b_XC: Tensor) -> Tensor:
    a_XC, b_XC = a_XC - a_XC.mean(-1, keepdim=True), b_XC - b_XC.mean(-1, keepdim=True)
    return (a_XC * b_XC).sum(-1) / (a_XC.norm(dim=-1) * b_XC.norm(dim=-1) + 1e-8)


def z_score(logits_XC: Tensor) -> Tensor:
    logits_XC = logits_XC.double()
    centered_XC = logits_XC - logits_XC.mean(-1, keepdim=True)
    spread_X1 = (centered_XC.square().sum(-1, keepdim=True) / (logits_XC.shape[-1] - 1)).sqrt()
    return centered_XC / (spread_X1 + 1e-7)
