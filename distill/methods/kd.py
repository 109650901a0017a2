"""`kd`: soft targets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from distill.losses import kd_loss
from distill.methods.base import Method, MethodSettings, Step, label_term, needs_one_teacher


class KD(MethodSettings):
    """(1 - alpha) label loss + alpha T**2 KL(teacher || student) at T."""

    name: Literal["kd"] = "kd"
    temperature: Annotated[float, Field(gt=0, le=1000)] = 4.0
    alpha: Annotated[float, Field(ge=0, le=1, description="Share of the teacher.")] = 0.9


def kd(settings: KD, step: Step) -> dict[str, Tensor]:
    """Whole-image logits against the teacher's.

    Source: Hinton et al. 2015; T = 4 and 0.9 are the values of the CIFAR-100 tables.
    """
    logits_BC = step.student(step.images_B3HW)
    teacher_BC = step.teacher(temperature=settings.temperature)[:, 0]
    soft = kd_loss(logits_BC, teacher_BC, temperature=settings.temperature)
    return {
        "label": (1 - settings.alpha) * label_term(step, logits_BC),
        "soft": settings.alpha * soft,
    }


METHOD = Method(KD, kd, needs_one_teacher)
