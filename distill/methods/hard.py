"""`hard`: several teachers' verdicts as labels, by one head or by a head for each teacher."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.losses import multi_teacher_hard_loss
from distill.methods.fields import Share, Temperature
from distill.methods.heads import HeadSettings, answer_heads, needs_heads
from distill.methods.method import Method, Step, label_term


class Hard(HeadSettings):
    """(1 - alpha) label loss + alpha / n sum_i CE(head_i / T, the class that teacher_i names)."""

    name: Literal["hard"] = "hard"
    temperature: Temperature = 1.0
    alpha: Share = 0.5


def hard(settings: Hard, step: Step) -> dict[str, Tensor]:
    """`(1 - alpha) CE(z, y) + alpha / n sum_i CE(z_i / T, argmax v_i)` over all of `caches`.

    Heads as in `soft`. A teacher of a mixed view names one class.

    Source: Touvron et al., "Training data-efficient image transformers", ICML 2021, with n
    teachers; T = 1 and alpha 0.5 there.
    """
    answer = answer_heads(step.student, step.images_B3HW)
    teachers = [step.teacher_logits(cache=index)[:, 0] for index in range(len(step.teachers))]
    loss = multi_teacher_hard_loss(answer.teachers, teachers, temperature=settings.temperature)
    return {
        "label": (1 - settings.alpha) * label_term(step, answer.label_BC),
        "hard": settings.alpha * loss,
    }


METHOD = Method(Hard, hard, (needs_heads,))
