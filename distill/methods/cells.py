"""Cells of students and teachers, for the methods that compare them scale by scale.

Shape letters: B batch, R cells, C classes, D channels, H W sides of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor

from cache_service.errors import ConfigError
from cache_service.models.features import answer_cells, cell_logits, check_cells, pool_cells
from distill.losses import sdd_weights
from distill.methods.method import MethodSettings, RunFacts, Step, TeacherFacts, needs_one_teacher


class CellSettings(MethodSettings):
    """Settings shared by the methods on cells."""

    scales: Annotated[
        tuple[Annotated[int, Field(ge=1, le=64)], ...] | None,
        Field(min_length=1, description="Grids to use, of those recorded; all by default."),
    ] = None

    @field_validator("scales")
    @classmethod
    def _check_scales(cls, scales: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if scales and (scales[0] != 1 or list(scales) != sorted(set(scales))):
            raise ValueError(f"scales must start at 1 and strictly increase, got {list(scales)}")
        return scales


class StudentAnswer(NamedTuple):
    """The student's ordinary logits, for the label loss, and those of its cells."""

    logits_BC: Tensor
    cells_BRC: Tensor


def answer_student(step: Step, scales: Sequence[int]) -> StudentAnswer:
    """Both answers from one run of the backbone, pooled as the teacher's were.

    Chained pooling derives coarser cells from the finest that was recorded, so the student's are
    derived from that one too, whatever `scales` are used.
    """
    teacher = step.teachers[0]
    if not _is_chained(teacher):
        cells_BRC = cell_logits(step.student, step.images_B3HW, scales)
        return StudentAnswer(cells_BRC[:, 0], cells_BRC)

    def pool(map_BDHW: Tensor) -> Tensor:
        # A chained whole image is not the plain mean where the finest grid does not divide the
        # map, and labels are for the plain one.
        chained_BRD = pool_cells(map_BDHW, teacher.scales, pooling="chained")
        used_BRD = select_cells(chained_BRD, teacher.scales, scales)
        return torch.cat([pool_cells(map_BDHW, (1,)), used_BRD], dim=1)

    both_NC = answer_cells(step.student, step.images_B3HW, pool)
    both_BRC = both_NC.reshape(len(step.images_B3HW), -1, both_NC.shape[-1])
    return StudentAnswer(both_BRC[:, 0], both_BRC[:, 1:])


def _is_chained(teacher: TeacherFacts) -> bool:
    """Whether its whole image may be another one than the plain mean of the map."""
    return teacher.pooling == "chained" and teacher.scales != (1,)


def select_cells(cells_BRC: Tensor, recorded: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """The cells of the wanted scales, of those of all recorded ones, [B, R, C or D]."""
    if tuple(wanted) == tuple(recorded):
        return cells_BRC
    starts = dict(zip(recorded, accumulate((s * s for s in recorded), initial=0), strict=False))
    return torch.cat([cells_BRC.narrow(1, starts[side], side * side) for side in wanted], dim=1)


def weigh_cells(
    step: Step, teacher_BRC: Tensor, labels_B: Tensor, *, complementary_weight: float
) -> Tensor:
    """How much each cell counts, [B, R]: 1, or the complementary weight.

    Reports `complementary`, the share of cells where exactly one of the teacher's verdicts, on
    the cell and on the whole image, names the label; the others are consistent. And how much each
    kind weighs, per cell of all: `weight_consistent` and `weight_complementary`.
    """
    # At a weight of 2 the weights mark the complementary cells, whatever the loss gives them.
    marks_BR = sdd_weights(teacher_BRC, labels_B, complementary_weight=2.0) - 1.0
    share = marks_BR.mean()
    step.metrics.update(
        complementary=share,
        weight_consistent=1.0 - share,
        weight_complementary=complementary_weight * share,
    )
    return 1.0 + (complementary_weight - 1.0) * marks_BR


def needs_cells(settings: CellSettings, facts: RunFacts) -> None:
    """A check: one teacher, the scales recorded, and a student that has cells."""
    needs_one_teacher(settings, facts)
    teacher = facts.teachers[0]
    missing = [side for side in settings.scales or () if side not in teacher.scales]
    if missing:
        every = str(sorted({*teacher.scales, *missing})).replace(" ", "")
        raise ConfigError(
            f"method.scales asks for {list(settings.scales or ())}, but {teacher.origin} has "
            f"scales {list(teacher.scales)}.",
            hint=f"Record another cache with `kd-cache build FILE --set scales={every}`.",
        )
    if (settings.scales or teacher.scales) == (1,) and not _is_chained(teacher):
        return
    check_cells(facts.student, facts.input_size)
