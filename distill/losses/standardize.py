"""Logit standardization: the same mean and spread for both sides before any softmax.

Shape letters: X any leading axes, C classes.
"""

from __future__ import annotations

from torch import Tensor

from distill.losses.logspace import scale_logits

EPS = 1e-7
"""Added to the standard deviation, as published; rows of equal logits become zeros."""


def standardize_logits(logits_XC: Tensor, *, eps: float = EPS) -> Tensor:
    """Return the z-score of each row, [X, C], in standard deviations; float32 or wider.

    Given to any loss in place of raw logits, on both sides: the student is then free in its
    offset and scale. Gradients flow through mean and deviation.

    Source: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024. The standard
    deviation divides by C - 1, as in its code, where a base temperature of 2 and a soft weight of
    9 go with it.
    """
    shifted_XC = scale_logits(logits_XC, temperature=1.0)
    centered_XC = shifted_XC - shifted_XC.mean(dim=-1, keepdim=True)
    return centered_XC / (eps + shifted_XC.std(dim=-1, keepdim=True))
