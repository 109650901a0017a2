"""`kd`: soft targets."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.losses import kd_loss
from distill.methods.fields import Share, Temperature
from distill.methods.method import Method, RunFacts, Step, label_term, needs_one_teacher
from distill.methods.standardized import StandardizeSettings, needs_spread, standardized


class KD(StandardizeSettings):
    """(1 - alpha) label loss + alpha T**2 KL(teacher || student) at T."""

    name: Literal["kd"] = "kd"
    temperature: Temperature = 4.0
    alpha: Share = 0.9


def kd(settings: KD, step: Step) -> dict[str, Tensor]:
    """Whole-image logits against the teacher's.

    Source: Hinton et al. 2015; T = 4 and 0.9 are the values of the CIFAR-100 tables. With
    `standardize`, Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, who
    take T = 2 and weights 0.1 and 9: alpha = 0.989 here, at 9.1 times the learning rate and,
    with SGD, a 9.1th of the weight decay and of any clipping norm.
    """
    logits_BC = step.student(step.images_B3HW)
    teacher_BC = step.teacher_logits(temperature=settings.temperature)[:, 0]
    sides = standardized(settings, logits_BC, teacher_BC)
    soft = kd_loss(*sides, temperature=settings.temperature)
    return {
        "label": (1 - settings.alpha) * label_term(step, logits_BC),
        "soft": settings.alpha * soft,
    }


def check(settings: KD, facts: RunFacts) -> None:
    """One teacher; all of its logits where they are standardized."""
    needs_one_teacher(settings, facts)
    needs_spread(settings, facts)


METHOD = Method(KD, kd, (check,))
