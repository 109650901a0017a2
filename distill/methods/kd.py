"""Labels alone, and one teacher compared over the whole image: `ce`, `kd`, `logits` and `dist`.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor

from distill.losses import dist_terms, kd_loss, logit_matching_loss
from distill.methods.checks import (
    needs_every_logit,
    needs_logits_to_standardize,
    needs_one_teacher,
)
from distill.methods.method import Method, MethodSettings, Step, label_and_soft, label_term
from distill.methods.setting_types import Fraction, StandardizeSettings, Temperature, Weight


class CE(MethodSettings):
    """Cross-entropy on the label."""

    name: Literal["ce"] = "ce"


def ce(_settings: CE, step: Step) -> dict[str, Tensor]:
    """The label loss on the same views that other methods train on: the baseline.

    Teachers, if there are any, are not read.
    """
    return {"label": label_term(step, step.student(step.images_B3HW))}


class KD(StandardizeSettings):
    """(1 - alpha) label loss + alpha T**2 KL(teacher || student) at T."""

    name: Literal["kd"] = "kd"
    temperature: Temperature = 4.0
    alpha: Fraction = 0.9


def kd(settings: KD, step: Step) -> dict[str, Tensor]:
    """Whole-image logits against the teacher's.

    Source: Hinton et al. 2015; T = 4 and 0.9 are the values of the CIFAR-100 tables. With
    `standardize`, Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.
    """
    logits_BC = step.student(step.images_B3HW)
    teacher_BC = step.teacher_logits(temperature=settings.temperature)[:, 0]
    student_BC, teacher_BC = settings.standardized(logits_BC, teacher_BC)
    soft = kd_loss(student_BC, teacher_BC, temperature=settings.temperature)
    return label_and_soft(step, logits_BC, soft, alpha=settings.alpha)


class Logits(MethodSettings):
    """(1 - alpha) label loss + alpha / 2 mean squared difference of zero-mean logits."""

    name: Literal["logits"] = "logits"
    alpha: Fraction = 0.9


def match_logits(settings: Logits, step: Step) -> dict[str, Tensor]:
    """`(1 - alpha) CE + alpha / 2 mean_c ((z_c - mean z) - (v_c - mean v))**2`.

    The factor 1/2 makes it the limit of `kd` with the same alpha at high temperature, in value and
    in gradient.

    Source: Hinton et al. 2015, section 2.1; alpha as in `kd`.
    """
    logits_BC = step.student(step.images_B3HW)
    gap = logit_matching_loss(logits_BC, step.teacher_logits()[:, 0])
    return label_and_soft(step, logits_BC, gap / 2, alpha=settings.alpha)


class DIST(MethodSettings):
    """Label loss + beta (1 - correlation of classes) + gamma (1 - correlation of views)."""

    name: Literal["dist"] = "dist"
    temperature: Temperature = 1.0
    beta: Weight = 1.0
    gamma: Weight = 1.0


def dist(settings: DIST, step: Step) -> dict[str, Tensor]:
    """`CE + beta T**2 mean_b (1 - rho(p_b, q_b)) + gamma T**2 mean_c (1 - rho(p_c, q_c))`.

    rho is Pearson's correlation of teacher and student at T: of each view over its classes (term
    `inter`), of each class over the batch (term `intra`, which needs batches of several views).

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022. The
    defaults are those of its class; all of its published runs have other settings, listed below.
    """
    logits_BC = step.student(step.images_B3HW)
    label = label_term(step, logits_BC)
    inter, intra = dist_terms(
        step.gather(logits_BC),
        step.gather(step.teacher_logits(temperature=settings.temperature)[:, 0]),
        temperature=settings.temperature,
        beta=settings.beta,
        gamma=settings.gamma,
    )
    return {"label": label, "inter": inter, "intra": intra}


METHODS = (
    Method(CE, ce),
    Method(KD, kd, (needs_one_teacher, needs_logits_to_standardize)),
    Method(
        Logits,
        match_logits,
        (needs_one_teacher, partial(needs_every_logit, why="matches every logit by itself")),
    ),
    Method(DIST, dist, (needs_one_teacher,)),
)
