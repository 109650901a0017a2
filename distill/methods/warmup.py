"""The factor by which the decoupled methods bring their teacher in."""

from __future__ import annotations

import math

from distill.losses.schedules import warm_up
from distill.methods.method import Step


def warm_up_factor(step: Step, *, epochs: float) -> float:
    """min(n / epochs, 1) in the n-th epoch, n from 1; 1 where `epochs` is 0.

    Held for a whole epoch, as in the codes that made the published tables.
    """
    return warm_up(math.floor(step.epoch) + 1, epochs=epochs)
