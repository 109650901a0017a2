"""`logits`: logit matching, what soft targets become at high temperature."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.losses import logit_matching_loss
from distill.methods.fields import Share
from distill.methods.method import (
    Method,
    MethodSettings,
    RunFacts,
    Step,
    label_term,
    needs_every_logit,
    needs_one_teacher,
)


class Logits(MethodSettings):
    """(1 - alpha) label loss + alpha / 2 mean squared difference of zero-mean logits."""

    name: Literal["logits"] = "logits"
    alpha: Share = 0.9


def match_logits(settings: Logits, step: Step) -> dict[str, Tensor]:
    """`(1 - alpha) CE + alpha / 2 mean_c ((z_c - mean z) - (v_c - mean v))**2`.

    The half makes it the limit of `kd` with the same alpha, in value and in gradient.

    Source: Hinton et al. 2015, section 2.1; alpha as in `kd`.
    """
    logits_BC = step.student(step.images_B3HW)
    gap = logit_matching_loss(logits_BC, step.teacher_logits()[:, 0])
    return {
        "label": (1 - settings.alpha) * label_term(step, logits_BC),
        "soft": settings.alpha / 2 * gap,
    }


def check(settings: Logits, facts: RunFacts) -> None:
    """One teacher, with all of its logits."""
    needs_one_teacher(settings, facts)
    needs_every_logit(settings, facts, why="matches every logit by itself")


METHOD = Method(Logits, match_logits, (check,))
