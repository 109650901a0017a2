"""`cs-kd`: another sample of the same class gives the soft target."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill.losses import cskd_loss
from distill.methods.base import (
    Method,
    MethodSettings,
    Needs,
    Plan,
    Step,
    label_term,
    needs_unmixed,
    see_others,
)
from distill.methods.fields import Temperature, Weight


class CSKD(MethodSettings):
    """Label loss + consistency x T**2 KL(classmate || sample) at T; no teacher."""

    name: Literal["cs-kd"] = "cs-kd"
    temperature: Temperature = 4.0
    consistency: Annotated[Weight, Field(description="Of the classmate's answer.")] = 1.0


def cs_kd(settings: CSKD, step: Step) -> dict[str, Tensor]:
    """`CE(z) + consistency T**2 KL(p(z'; T) || p(z; T))`, z' the logits of a classmate's view.

    A classmate is another sample of the same class, drawn anew each epoch, under the same seed.
    It is answered in training mode without gradients, and learns nothing itself in this step. The
    only sample of a class is its own classmate: the same view, answered a second time.

    Source: Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation",
    CVPR 2020, and its code: T = 4, weight 1.
    """
    _, mates_B3HW = see_others(step, step.batch.classmates)
    logits_BC = step.student(step.images_B3HW)
    with torch.no_grad():
        mates_BC = step.student(mates_B3HW)
    matched = cskd_loss(logits_BC, mates_BC, temperature=settings.temperature)
    return {"label": label_term(step, logits_BC), "soft": settings.consistency * matched}


def check(settings: CSKD, plan: Plan) -> None:
    """No mixing: a mixed view is of two classes."""
    needs_unmixed(settings, plan, why="compares views of one class")


METHOD = Method(CSKD, cs_kd, check, needs=lambda _: Needs(classmates=True))
