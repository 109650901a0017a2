"""`nkd`: the teacher's weight on the target, and the other classes renormalized."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.losses import majority_labels, nkd_loss
from distill.methods.fields import Classes, Temperature, WarmupEpochs, Weight
from distill.methods.method import (
    Method,
    MethodSettings,
    Step,
    depends_on_temperature,
    label_term,
    needs_one_teacher,
)
from distill.methods.warmup import warm_up_factor


class NKD(MethodSettings):
    """Label loss + warm-up x NKD; `classes: all` keeps the target in the soft term."""

    name: Literal["nkd"] = "nkd"
    temperature: Temperature = 1.0
    gamma: Weight = 1.5
    classes: Classes = "others"
    warmup_epochs: WarmupEpochs = 20.0


def nkd(settings: NKD, step: Step) -> dict[str, Tensor]:
    """`CE + min(n/20, 1) ( -p_y log q_y - gamma T**2 sum_{c != y} p^_c log q^_c )` in epoch n.

    p and q are teacher and student at T = 1; p^ and q^ at T, renormalized without the label y; of
    a mixed view, y is the larger part.

    Source: Yang et al., ICCV 2023, whose defaults these are, T = 1 and gamma 1.5, but for the
    warm-up: theirs has none, and the NKD columns of Wei et al., CVPR 2024, were made with that of
    DKD. They were also made with `classes: all`; see `nkd_loss` for how that came about.
    """
    logits_BC = step.student(step.images_B3HW)
    teacher_BC = step.teacher_logits(temperature=settings.temperature)[:, 0]
    soft = nkd_loss(
        logits_BC,
        teacher_BC,
        majority_labels(*step.labels),
        temperature=settings.temperature,
        gamma=settings.gamma,
        classes=settings.classes,
        teacher_at_1_XC=step.teacher_logits()[:, 0] if depends_on_temperature(step) else None,
    )
    return {
        "label": label_term(step, logits_BC),
        "soft": warm_up_factor(step, epochs=settings.warmup_epochs) * soft,
    }


METHOD = Method(NKD, nkd, (needs_one_teacher,))
