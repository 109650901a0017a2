"""Softmax, KL and target-against-rest arithmetic in log space, under every loss of this package.

Shape letters: X any leading axes, C classes. Labels are int64 and broadcast against X, so that
labels [B, 1] serve logits [B, R, C].

Nothing here takes the logarithm of a probability: one that underflows float32 still has its exact
logarithm, which is what keeps every loss finite for logits of 1e4 at T = 0.1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from cache_service.errors import ConfigError


def widen(values: Tensor) -> Tensor:
    """Return `values` in float32, or in float64 where they already are.

    Losses are summed in this type even under autocast, which hands over bfloat16 logits.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def scale_logits(logits_XC: Tensor, *, temperature: float) -> Tensor:
    """Return (logits - their largest) / T, [X, C], in float32 or wider.

    Softmax does not see the shift, only differences, and those are rounded to 4e-3 nats where
    logits near 1e4 are divided by T = 0.1 as they are.
    """
    wide_XC = widen(logits_XC)
    return (wide_XC - wide_XC.amax(dim=-1, keepdim=True).detach()) / temperature


def log_probabilities(logits_XC: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / T), [X, C], in nats."""
    return log_softmax(scale_logits(logits_XC, temperature=temperature), dim=-1)


def refuse_other_shape(student_logits_XC: Tensor, teacher_logits_XC: Tensor) -> None:
    """Refuse logits that would be broadcast against each other, a view against those of others.

    Raises:
        ConfigError: the shapes differ.
    """
    if student_logits_XC.shape != teacher_logits_XC.shape:
        raise ConfigError(
            f"logits of the student are {list(student_logits_XC.shape)}, those of the teacher "
            f"{list(teacher_logits_XC.shape)}.",
            hint="A cache with cells gives [batch, cells, classes]: compare the whole image with "
            "teacher_logits[:, 0], or cells with an sdd loss and cell_logits of the student.",
        )


def kl_rows(log_p_XC: Tensor, log_q_XC: Tensor) -> Tensor:
    """Return KL(p || q) of each row, [X], in nats.

    A class may be missing from p (log p = -inf), from both too. The added `q - p` is zero in
    exact arithmetic, where both sum to 1; in float32 it cancels the rounding that log-sum-exp
    leaves in whole rows, which T**2 blows up: 6e-4 of the loss at T = 100, against 1e-5 with it.
    """
    p_XC = log_p_XC.exp()
    gap_XC = torch.where(p_XC > 0, log_p_XC - log_q_XC, 0.0)
    return (p_XC * gap_XC + (log_q_XC.exp() - p_XC)).sum(dim=-1)


def cross_entropy_rows(log_p_XC: Tensor, log_q_XC: Tensor) -> Tensor:
    """Return -sum p log q of each row, [X], in nats. A class may be missing from p."""
    p_XC = log_p_XC.exp()
    return -(p_XC * torch.where(p_XC > 0, log_q_XC, 0.0)).sum(dim=-1)


def pick(values_XC: Tensor, labels_X: Tensor) -> Tensor:
    """Return the value of each row's label, [X]."""
    index_X = labels_X.expand(values_XC.shape[:-1])
    return values_XC.gather(-1, index_X.unsqueeze(-1)).squeeze(-1)


def without_target(logits_XC: Tensor, labels_X: Tensor) -> Tensor:
    """Return the logits with the label's at -inf, [X, C]: softmax of it leaves the label out.

    Published codes subtract 1000 instead, which fails to hide a logit that leads by 1000.
    """
    classes_C = torch.arange(logits_XC.shape[-1], device=logits_XC.device)
    return widen(logits_XC).masked_fill(labels_X.unsqueeze(-1) == classes_C, -torch.inf)
