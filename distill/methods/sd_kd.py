"""`sd-kd`: soft targets cell by cell, those that contradict the whole image counted more."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.losses import kd_rows, majority_labels
from distill.methods.cells import (
    CellSettings,
    answer_student,
    needs_cells,
    select_cells,
    weigh_cells,
)
from distill.methods.fields import ComplementaryWeight, Share, Temperature
from distill.methods.method import Method, RunFacts, Step, label_term
from distill.methods.standardized import StandardizeSettings, needs_spread, standardized


class SDKD(CellSettings, StandardizeSettings):
    """(1 - alpha) label loss + alpha mean over cells of w T**2 KL(teacher || student) at T."""

    name: Literal["sd-kd"] = "sd-kd"
    temperature: Temperature = 4.0
    alpha: Share = 0.9
    complementary_weight: ComplementaryWeight = 2.0


def sd_kd(settings: SDKD, step: Step) -> dict[str, Tensor]:
    """Cells against the teacher's; the label loss takes the ordinary logits.

    `standardize` z-scores each cell's logits on both sides first.

    Reports `complementary`, the share of cells where exactly one of the teacher's verdicts, on
    the cell and on the whole image, names the label; and what each kind of cell weighs, per cell
    of all, as `weight_consistent` and `weight_complementary`.

    Source: Wei et al., "Scale Decoupled Distillation", CVPR 2024; defaults of its published code.
    """
    recorded = step.teachers[0].scales
    scales = settings.scales or recorded
    answer = answer_student(step, scales)
    teacher_BRC = step.teacher_logits(temperature=settings.temperature)
    teacher_BRC = select_cells(teacher_BRC, recorded, scales)
    labels_B = majority_labels(*step.labels)
    weights_BR = weigh_cells(
        step, teacher_BRC, labels_B, complementary_weight=settings.complementary_weight
    )
    sides = standardized(settings, answer.cells_BRC, teacher_BRC)
    soft = (weights_BR * kd_rows(*sides, temperature=settings.temperature)).mean()
    return {
        "label": (1 - settings.alpha) * label_term(step, answer.logits_BC),
        "soft": settings.alpha * soft,
    }


def check(settings: SDKD, facts: RunFacts) -> None:
    """One teacher with cells; all of its logits where they are standardized."""
    needs_cells(settings, facts)
    needs_spread(settings, facts)


METHOD = Method(SDKD, sd_kd, (check,))
