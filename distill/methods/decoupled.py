"""The target class separated from the others: `dkd` and `nkd`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.losses import dkd_loss, majority_labels, nkd_loss
from distill.methods.checks import needs_logits_to_standardize, needs_one_teacher
from distill.methods.method import Method, MethodSettings, Step, label_term
from distill.methods.setting_types import (
    Classes,
    StandardizeSettings,
    Temperature,
    WarmupEpochs,
    Weight,
)


class DKD(StandardizeSettings):
    """Label loss + warm-up (alpha TCKD + beta NCKD)."""

    name: Literal["dkd"] = "dkd"
    temperature: Temperature = 4.0
    alpha: Weight = 1.0
    beta: Weight = 8.0
    warmup_epochs: WarmupEpochs = 20.0


def dkd(settings: DKD, step: Step) -> dict[str, Tensor]:
    """`CE + min(n/20, 1) (alpha TCKD + beta NCKD)` in epoch n, both terms with T**2.

    TCKD = T**2 KL of the (target, rest) distributions, NCKD = T**2 KL of those without the
    target, teacher || student at T. Reports both, unweighted, as `tckd` and `nckd`. The target of
    a mixed view is its larger part. `standardize` z-scores the logits of both sides first.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022. The defaults are the
    settings of mdistiller for most pairs on CIFAR-100; with `standardize`, for ImageNet and for
    some pairs the published settings are others, listed below. Departures: those of `dkd_loss`.
    """
    logits_BC = step.student(step.images_B3HW)
    teacher_BC = step.teacher_logits(temperature=settings.temperature)[:, 0]
    student_BC, teacher_BC = settings.standardized(logits_BC, teacher_BC)
    loss = dkd_loss(
        student_BC,
        teacher_BC,
        majority_labels(*step.labels),
        temperature=settings.temperature,
        alpha=settings.alpha,
        beta=settings.beta,
        report=step.metrics,
    )
    factor = step.warm_up(settings.warmup_epochs)
    return {"label": label_term(step, logits_BC), "soft": factor * loss}


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

    Source: Yang et al., ICCV 2023. The defaults are its settings for ImageNet, T = 1 and gamma 1.5,
    except for the warm-up: theirs has none, and the NKD columns of Wei et al., CVPR 2024, were made
    with that of DKD. They were also made with `classes: all`; see `nkd_loss` for the reason.
    """
    logits_BC = step.student(step.images_B3HW)
    loss = nkd_loss(
        logits_BC,
        step.teacher_logits(temperature=settings.temperature)[:, 0],
        majority_labels(*step.labels),
        temperature=settings.temperature,
        gamma=settings.gamma,
        classes=settings.classes,
        teacher_at_1_XC=step.teacher_logits()[:, 0] if step.teachers[0].drops_classes else None,
    )
    factor = step.warm_up(settings.warmup_epochs)
    return {"label": label_term(step, logits_BC), "soft": factor * loss}


METHODS = (
    Method(DKD, dkd, (needs_one_teacher, needs_logits_to_standardize)),
    Method(NKD, nkd, (needs_one_teacher,)),
)
