"""`dkd`: the target against the rest, and the rest among themselves, each with its own weight."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.losses import majority_labels, nckd_rows, tckd_rows
from distill.methods.fields import Temperature, WarmupEpochs, Weight
from distill.methods.method import Method, RunFacts, Step, label_term, needs_one_teacher
from distill.methods.standardized import StandardizeSettings, needs_spread, standardized
from distill.methods.warmup import warm_up_factor


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

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, with the settings of
    mdistiller: T = 4, alpha 1, warm-up over 20 epochs; beta 8 for most pairs, 6 from vgg13
    and for wrn_40_2 -> wrn_16_2, 2 for resnet56 -> resnet20 and resnet110 -> resnet32. Departures:
    those of `dkd_loss`.
    """
    logits_BC = step.student(step.images_B3HW)
    teacher_BC = step.teacher_logits(temperature=settings.temperature)[:, 0]
    labels_B = majority_labels(*step.labels)
    student_BC, teacher_BC = standardized(settings, logits_BC, teacher_BC)
    rows = (student_BC, teacher_BC, labels_B)
    tckd = tckd_rows(*rows, temperature=settings.temperature).mean()
    nckd = nckd_rows(*rows, temperature=settings.temperature).mean()
    step.metrics.update(tckd=tckd.detach(), nckd=nckd.detach())
    factor = warm_up_factor(step, epochs=settings.warmup_epochs)
    return {
        "label": label_term(step, logits_BC),
        "soft": factor * (settings.alpha * tckd + settings.beta * nckd),
    }


def check(settings: DKD, facts: RunFacts) -> None:
    """One teacher; all of its logits where they are standardized."""
    needs_one_teacher(settings, facts)
    needs_spread(settings, facts)


METHOD = Method(DKD, dkd, (check,))
