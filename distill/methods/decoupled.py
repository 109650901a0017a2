"""Cells with the weight of each: what `sd-dkd` and `sd-nkd` have in common.

Shape letters: B batch, R cells, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distill.losses import majority_labels
from distill.methods.cells import CellSettings, answer_student, select_cells, weigh_cells
from distill.methods.fields import ComplementaryWeight, Temperature, WarmupEpochs
from distill.methods.method import Step


class DecoupledSettings(CellSettings):
    """Settings shared by the decoupled methods on cells."""

    temperature: Temperature = 4.0
    complementary_weight: ComplementaryWeight = 2.0
    warmup_epochs: WarmupEpochs = 20.0


class DecoupledCells(NamedTuple):
    """Both sides' cells, and how much each counts.

    Attributes:
        logits_BC: the student's ordinary logits, for the label loss.
        student_BRC: logits of the student's cells.
        teacher_BRC: logits of the teacher's.
        labels_B1: target class, the same in every cell.
        weights_BR: of each cell's loss; 1 or the complementary weight.
    """

    logits_BC: Tensor
    student_BRC: Tensor
    teacher_BRC: Tensor
    labels_B1: Tensor
    weights_BR: Tensor


def teacher_cells(settings: DecoupledSettings, step: Step, *, temperature: float) -> Tensor:
    """Logits [B, R, C] of the cells in use, for a temperature."""
    recorded = step.teachers[0].scales
    return select_cells(
        step.teacher_logits(temperature=temperature), recorded, settings.scales or recorded
    )


def decouple(settings: DecoupledSettings, step: Step) -> DecoupledCells:
    """Answer with both sides' cells, and weigh them; reports what `weigh_cells` does."""
    recorded = step.teachers[0].scales
    scales = settings.scales or recorded
    answer = answer_student(step, scales)
    teacher_BRC = teacher_cells(settings, step, temperature=settings.temperature)
    labels_B = majority_labels(*step.labels)
    weights_BR = weigh_cells(
        step, teacher_BRC, labels_B, complementary_weight=settings.complementary_weight
    )
    return DecoupledCells(
        logits_BC=answer.logits_BC,
        student_BRC=answer.cells_BRC,
        teacher_BRC=teacher_BRC,
        labels_B1=labels_B.unsqueeze(-1),
        weights_BR=weights_BR,
    )
