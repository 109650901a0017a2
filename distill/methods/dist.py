"""`dist`: the teacher's correlations between and within classes, not its exact values."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.losses import inter_class_loss, intra_class_loss
from distill.methods.fields import Temperature, Weight
from distill.methods.method import Method, MethodSettings, Step, label_term, needs_one_teacher


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

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, with the
    defaults of its code; its CIFAR-100 runs have T = 4, beta = gamma = 2.
    """
    logits_BC = step.student(step.images_B3HW)
    sides = (logits_BC, step.teacher_logits(temperature=settings.temperature)[:, 0])
    return {
        "label": label_term(step, logits_BC),
        "inter": settings.beta * inter_class_loss(*sides, temperature=settings.temperature),
        "intra": settings.gamma * intra_class_loss(*sides, temperature=settings.temperature),
    }


METHOD = Method(DIST, dist, (needs_one_teacher,))
