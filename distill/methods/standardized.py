"""Logit standardization as a setting of methods that compare a student's softmax with a teacher's.

It was published for those: here `kd`, `dkd`, their forms on cells, `soft` and `ensemble`. Others
have no such setting: students that teach themselves or each other were not among them; `hard` sees
verdicts, which it does not change; `nkd` weighs by how sure the teacher is, which it takes away;
`dist` has correlations instead, and `logits` no softmax.
"""

from __future__ import annotations

from torch import Tensor

from distill.losses import standardize_logits
from distill.methods.fields import Standardize
from distill.methods.method import MethodSettings, RunFacts, needs_every_logit


class StandardizeSettings(MethodSettings):
    """Settings shared by the methods that can standardize logits."""

    standardize: Standardize = False


def standardized(settings: StandardizeSettings, *sides: Tensor) -> tuple[Tensor, ...]:
    """Logits [..., C] as the settings want them compared."""
    if not settings.standardize:
        return sides
    return tuple(standardize_logits(logits_XC) for logits_XC in sides)


def needs_spread(settings: StandardizeSettings, facts: RunFacts) -> None:
    """A check: no teacher's cache dropped classes where the spread of all of them is asked for."""
    if settings.standardize:
        needs_every_logit(
            settings, facts, why="with standardize divides by the spread of all logits"
        )
