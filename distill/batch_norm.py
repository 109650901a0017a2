"""Batch norm over the views of all ranks.

torch's SyncBatchNorm runs on GPUs only and replaces the modules of a network. Here
`torch.nn.functional.batch_norm` is intercepted, which torch's and timm's batch norm layers call, so
the network's modules stay as they are.

Shape letters: B views of this rank, X any further axes, C channels, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode


class Exchange(NamedTuple):
    """Collective operations on small tensors.

    Attributes:
        stack: function from a tensor [...] of each rank to those of all ranks, [W, ...].
        sum_over_ranks: function that adds up a tensor over all ranks, in place.
    """

    stack: Callable[[Tensor], Tensor]
    sum_over_ranks: Callable[[Tensor], Tensor]


class GlobalBatchNorm(TorchFunctionMode):
    """Context in which batch norms in training mode compute statistics over all ranks."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace one function; all others are called as they are."""
        if func is batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        values_BCX: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return batch_norm(
                values_BCX, running_mean, running_var, weight, bias, False, momentum, eps
            )

        def update(mean_C: Tensor, var_C: Tensor, count: Tensor) -> None:
            if running_mean is not None and running_var is not None:
                # As torch does, the running variance is the unbiased one.
                unbiased_C = var_C * (count / (count - 1).clamp(min=1))
                running_mean.lerp_(mean_C.to(running_mean.dtype), momentum)
                running_var.lerp_(unbiased_C.to(running_var.dtype), momentum)

        result_BCX: Tensor = _Normalize.apply(values_BCX, weight, bias, eps, self._exchange, update)
        return result_BCX


class _Normalize(torch.autograd.Function):
    """Values [B, C, X] normalized by the mean and the biased variance of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        values_BCX: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        eps: float,
        exchange: Exchange,
        update: Callable[[Tensor, Tensor, Tensor], None],
    ) -> Tensor:
        wide_BCX = _widen(values_BCX)
        axes = [axis for axis in range(values_BCX.ndim) if axis != 1]
        count = wide_BCX.new_full((1,), values_BCX.numel() / values_BCX.shape[1])
        mean_C = wide_BCX.mean(axes)
        # About the rank's own mean: a difference of sums of squares would lose digits.
        squares_C = (wide_BCX - _along(mean_C, wide_BCX)).square().sum(axes)
        own = torch.cat([count, mean_C, squares_C]).double()
        parts = [1, len(mean_C), len(mean_C)]
        counts_W1, means_WC, squares_WC = torch.split(exchange.stack(own), parts, dim=1)
        total = counts_W1.sum(0)
        mean_C = (counts_W1 * means_WC).sum(0) / total
        gaps_WC = counts_W1 * (means_WC - mean_C).square()
        var_C = (squares_WC + gaps_WC).sum(0) / total
        scale_C = (var_C + eps).rsqrt().to(wide_BCX.dtype)
        mean_C, var_C, total = (each.to(wide_BCX.dtype) for each in (mean_C, var_C, total))
        # Before the tensors are saved: activation checkpointing, which runs this function again in
        # the backward pass, leaves it as soon as it has the last saved tensor.
        update(mean_C, var_C, total)
        ctx.save_for_backward(values_BCX, weight_C, mean_C, scale_C, total)
        ctx.axes, ctx.exchange = axes, exchange
        result_BCX = (wide_BCX - _along(mean_C, wide_BCX)) * _along(scale_C, wide_BCX)
        if weight_C is not None:
            result_BCX = result_BCX * _along(weight_C, result_BCX)
        if bias_C is not None:
            result_BCX = result_BCX + _along(bias_C, result_BCX)
        return result_BCX.to(values_BCX.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BCX: Tensor) -> tuple[Tensor | None, ...]:
        values_BCX, weight_C, mean_C, scale_C, total = ctx.saved_tensors
        grad_BCX, wide_BCX = _widen(grad_BCX), _widen(values_BCX)
        unit_BCX = (wide_BCX - _along(mean_C, wide_BCX)) * _along(scale_C, wide_BCX)
        own_2C = torch.stack([grad_BCX.sum(ctx.axes), (grad_BCX * unit_BCX).sum(ctx.axes)])
        # A statistic depends on the views of all ranks, so its gradient is theirs together.
        mean_2C = ctx.exchange.sum_over_ranks(own_2C.clone()) / total
        inner_BCX = grad_BCX - _along(mean_2C[0], grad_BCX)
        inner_BCX = inner_BCX - unit_BCX * _along(mean_2C[1], grad_BCX)
        factor_C = scale_C if weight_C is None else scale_C * weight_C
        values_grad = (inner_BCX * _along(factor_C, grad_BCX)).to(values_BCX.dtype)
        # The gradients of parameters are added up over the ranks with all others.
        weight_grad = None if weight_C is None else own_2C[1].to(weight_C.dtype)
        bias_grad = own_2C[0].to(scale_C.dtype) if ctx.needs_input_grad[2] else None
        return values_grad, weight_grad, bias_grad, None, None, None


def _widen(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _along(channel_C: Tensor, like_BCX: Tensor) -> Tensor:
    """One value for each channel, shaped to broadcast."""
    return channel_C.reshape(-1, *[1] * (like_BCX.ndim - 2))
