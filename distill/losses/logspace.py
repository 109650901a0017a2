"""Softmax, KL and target-against-rest arithmetic in log space, under every loss of this package.

Shape letters: X any leading axes, C classes. Labels are int64 and broadcast against X, so that
labels [B, 1] serve logits [B, R, C].

Nothing here takes the logarithm of a probability: one that underflows float32 still has its exact
logarithm, which is what keeps every loss finite for logits of 1e4 at T = 0.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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


class _SoftKL(torch.autograd.Function):
    """See `soft_kl_rows`. Autograd would keep five tensors [X, C] for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, student_logits_XC: Tensor, teacher_logits_XC: Tensor, temperature: float
    ) -> Tensor:
        log_q_XC = log_probabilities(student_logits_XC, temperature=temperature)
        log_p_XC = log_probabilities(teacher_logits_XC, temperature=temperature)
        # The wider of both types, because what follows is computed in place.
        dtype = torch.promote_types(log_p_XC.dtype, log_q_XC.dtype)
        log_p_XC, log_q_XC = log_p_XC.to(dtype), log_q_XC.to(dtype)
        p_XC = log_p_XC.exp()
        gap_XC = log_p_XC.sub_(log_q_XC).masked_fill_(p_XC == 0, 0.0)
        # The result of `kl_rows`, in place; what remains is the gradient by the scaled logits.
        q_minus_p_XC = log_q_XC.exp_().sub_(p_XC)
        ctx.save_for_backward(q_minus_p_XC)
        ctx.temperature, ctx.dtype = temperature, student_logits_XC.dtype
        rows_X: Tensor = gap_XC.mul_(p_XC).add_(q_minus_p_XC).sum(dim=-1)
        return rows_X

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (q_minus_p_XC,) = ctx.saved_tensors
        scale_X1 = (grads[0] / ctx.temperature).unsqueeze(-1)
        return (q_minus_p_XC * scale_X1).to(ctx.dtype), None, None


def soft_kl_rows(
    student_logits_XC: Tensor, teacher_logits_XC: Tensor, *, temperature: float
) -> Tensor:
    """Return KL(teacher || student) at temperature T of each row, [X], in nats.

    The same values as `kl_rows` of both `log_probabilities`, in half of the time: only
    the gradient by the student's logits, (q - p) / T, is kept for the backward pass. The teacher
    and the temperature are constants, and there is no second derivative. A logit of -inf leaves its
    class out, on both sides.
    """
    rows_X: Tensor = _SoftKL.apply(student_logits_XC, teacher_logits_XC.detach(), temperature)
    return rows_X


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
