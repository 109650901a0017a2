"""`soft`: several teachers' soft targets, by one head or by a head for each teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from distill.losses import multi_teacher_soft_loss
from distill.losses.soft_targets import Direction
from distill.methods.fields import Share, Temperature
from distill.methods.heads import HeadSettings, answer_heads, needs_heads
from distill.methods.method import Method, RunFacts, Step, label_term
from distill.methods.standardized import StandardizeSettings, needs_spread, standardized


class Soft(HeadSettings, StandardizeSettings):
    """(1 - alpha) label loss + alpha T**2 / n sum_i KL(teacher_i || head_i) at T."""

    name: Literal["soft"] = "soft"
    temperature: Temperature = 3.0
    alpha: Share = 0.1
    direction: Annotated[
        Direction, Field(description="forward: KL(teacher || student); reverse: the other way.")
    ] = "forward"


def soft(settings: Soft, step: Step) -> dict[str, Tensor]:
    """`(1 - alpha) CE(z) + alpha T**2 / n sum_i KL(p(v_i; T) || p(z_i; T))` over all of `caches`.

    z is the student's label head; z_i its head for teacher i, the one that all teachers share, or
    z itself in a student without heads for teachers. `standardize` z-scores all z_i and v_i first.

    Source: Touvron et al., "Training data-efficient image transformers", ICML 2021, with n
    teachers; T = 3 and alpha 0.1 there. Departure: that code averages the KL over classes too, so
    its alpha weighs C times less than this one.
    """
    answer = answer_heads(step.student, step.images_B3HW)
    teachers = [
        step.teacher_logits(temperature=settings.temperature, cache=index)[:, 0]
        for index in range(len(step.teachers))
    ]
    loss = multi_teacher_soft_loss(
        standardized(settings, *answer.teachers),
        standardized(settings, *teachers),
        temperature=settings.temperature,
        direction=settings.direction,
    )
    return {
        "label": (1 - settings.alpha) * label_term(step, answer.label_BC),
        "soft": settings.alpha * loss,
    }


def check(settings: Soft, facts: RunFacts) -> None:
    """Teachers and heads for them; all of their logits where they are standardized."""
    needs_heads(settings, facts)
    needs_spread(settings, facts)


METHOD = Method(Soft, soft, (check,))
