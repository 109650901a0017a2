"""`cs-kd`: another sample of the same class gives the soft target."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill.losses import cskd_loss
from distill.methods.fields import Temperature, Weight
from distill.methods.method import (
    Method,
    MethodSettings,
    RunFacts,
    Step,
    label_term,
    needs_unmixed,
)
from distill.methods.requirements import Requirements, SameClassPair


class CSKD(MethodSettings):
    """Label loss + consistency x T**2 KL(pair || sample) at T; no teacher."""

    name: Literal["cs-kd"] = "cs-kd"
    temperature: Temperature = 4.0
    consistency: Annotated[Weight, Field(description="Of the KL to the same-class pair.")] = 1.0


def cs_kd(settings: CSKD, step: Step) -> dict[str, Tensor]:
    """`CE(z) + consistency T**2 KL(p(z'; T) || p(z; T))`, z' the logits of its same-class pair.

    That is a view of another sample of the same class, drawn anew each epoch, under the same seed.
    Its logits are computed in training mode without gradients. The only sample of a class is
    paired with itself.

    Source: Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation",
    CVPR 2020, and its code: T = 4, weight 1.
    """
    logits_BC = step.student(step.images_B3HW)
    with torch.no_grad():
        pair_BC = step.student(step.other_views(SameClassPair).images_B3HW)
    matched = cskd_loss(logits_BC, pair_BC, temperature=settings.temperature)
    return {"label": label_term(step, logits_BC), "soft": settings.consistency * matched}


def check(settings: CSKD, facts: RunFacts) -> None:
    """No mixing: a mixed view is of two classes."""
    needs_unmixed(settings, facts, why="compares views of one class")


METHOD = Method(CSKD, cs_kd, (check,), lambda _: Requirements(other_views=(SameClassPair,)))
