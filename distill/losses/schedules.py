"""Temperatures and weights as plain functions of the epoch.

`epoch` is fractional and 0.0 at the start of training. Past its end a schedule keeps its last
value.
"""

from __future__ import annotations

import math


def _progress(epoch: float, epochs: float) -> float:
    """Return how much of the schedule is behind, 0..1; a schedule of no length is over."""
    return min(max(epoch / epochs, 0.0), 1.0) if epochs > 0 else 1.0


def constant(epoch: float, *, value: float) -> float:  # noqa: ARG001 - one signature for all
    """Return `value` at every epoch."""
    return value


def linear(epoch: float, *, start: float, end: float, epochs: float) -> float:
    """Return the point on the straight line from `start` to `end` over `epochs`."""
    share = _progress(epoch, epochs)
    return (1.0 - share) * start + share * end


def cosine(epoch: float, *, start: float, end: float, epochs: float) -> float:
    """Return the point on half a cosine from `start` to `end` over `epochs`, flat at both ends."""
    share = 0.5 * (1.0 + math.cos(math.pi * _progress(epoch, epochs)))
    return share * start + (1.0 - share) * end


def warm_up(epoch: float, *, epochs: float = 20.0) -> float:
    """Return min(epoch / epochs, 1), the factor before DKD, NKD and their forms on cells.

    Source: mdistiller and the SDD code; 20 epochs on CIFAR-100, 1 on ImageNet. They count epochs
    from 1 and hold the factor for a whole epoch: pass floor(epoch) + 1 for exactly their values.
    """
    return _progress(epoch, epochs)
