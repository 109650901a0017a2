"""Student and teacher compared cell by cell: `sd-kd`, `sd-dkd` and `sd-nkd`.

Shape letters: B batch, R cells, C classes, D channels, H W sides of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from cache_service.errors import ConfigError
from cache_service.models.features import answer_cells, cell_logits, check_cells, pool_cells
from distill.losses import majority_labels, sdd_dkd_loss, sdd_kd_loss, sdd_nkd_loss
from distill.methods.checks import needs_logits_to_standardize, needs_one_teacher
from distill.methods.method import (
    Method,
    MethodSettings,
    RunFacts,
    Step,
    TeacherFacts,
    label_and_soft,
    label_term,
)
from distill.methods.setting_types import (
    Classes,
    ComplementaryWeight,
    Fraction,
    StandardizeSettings,
    Temperature,
    WarmupEpochs,
    Weight,
)


class CellSettings(MethodSettings):
    """Settings shared by the methods on cells."""

    scales: Annotated[
        tuple[Annotated[int, Field(ge=1, le=64)], ...] | None,
        Field(min_length=1, description="Grids to use, of those recorded; all by default."),
    ] = None
    temperature: Temperature = 4.0
    complementary_weight: ComplementaryWeight = 2.0

    @field_validator("scales")
    @classmethod
    def _check_scales(cls, scales: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if scales and (scales[0] != 1 or list(scales) != sorted(set(scales))):
            raise ValueError(f"scales must start at 1 and strictly increase, got {list(scales)}")
        return scales


class SDKD(CellSettings, StandardizeSettings):
    """(1 - alpha) label loss + alpha mean over cells of w T**2 KL(teacher || student) at T."""

    name: Literal["sd-kd"] = "sd-kd"
    alpha: Fraction = 0.9


def sd_kd(settings: SDKD, step: Step) -> dict[str, Tensor]:
    """Cells against the teacher's; the label loss takes the ordinary logits.

    `standardize` z-scores each cell's logits on both sides first.

    Reports `complementary`, the fraction of cells where exactly one of the teacher's predictions,
    for the cell and for the whole image, is the label; and the total weight of either kind of cell
    divided by the number of all cells, as `weight_consistent` and `weight_complementary`.

    Source: Wei et al., "Scale Decoupled Distillation", CVPR 2024. The defaults are its settings for
    CIFAR-100. Its networks pool a 4 x 4 grid first, which `scales: sdd` of a build file does: see
    [as published](#scale-decoupled-distillation-as-published).
    """
    logits_BC, cells_BRC = student_cells(settings, step)
    loss = sdd_kd_loss(
        cells_BRC,
        teacher_cells(settings, step, temperature=settings.temperature),
        majority_labels(*step.labels),
        temperature=settings.temperature,
        complementary_weight=settings.complementary_weight,
        standardize=settings.standardize,
        report=step.metrics,
    )
    return label_and_soft(step, logits_BC, loss, alpha=settings.alpha)


class SDDKD(CellSettings, StandardizeSettings):
    """Label loss + warm-up x mean over cells of w (alpha TCKD + beta NCKD)."""

    name: Literal["sd-dkd"] = "sd-dkd"
    warmup_epochs: WarmupEpochs = 20.0
    alpha: Weight = 1.0
    beta: Weight = 8.0


def sd_dkd(settings: SDDKD, step: Step) -> dict[str, Tensor]:
    """`CE + min(n/20, 1) mean_r( w_r (alpha TCKD_r + beta NCKD_r) )` in epoch n.

    The label loss takes the ordinary logits; the label is the target class of every cell, of a
    mixed view its larger part. Reports what `sd-kd` does, and the means of TCKD and NCKD over all
    cells, unweighted, as `tckd` and `nckd`. `standardize` z-scores each cell's logits on both
    sides first.

    Source: Wei et al., "Scale Decoupled Distillation", CVPR 2024. The defaults are its settings for
    most pairs on CIFAR-100; the pooling is that of `sd-kd`. Departures: those of `sdd_dkd_loss`.
    """
    logits_BC, cells_BRC = student_cells(settings, step)
    loss = sdd_dkd_loss(
        cells_BRC,
        teacher_cells(settings, step, temperature=settings.temperature),
        majority_labels(*step.labels),
        temperature=settings.temperature,
        alpha=settings.alpha,
        beta=settings.beta,
        complementary_weight=settings.complementary_weight,
        standardize=settings.standardize,
        report=step.metrics,
    )
    factor = step.warm_up(settings.warmup_epochs)
    return {"label": label_term(step, logits_BC), "soft": factor * loss}


class SDNKD(CellSettings):
    """Label loss + warm-up x mean over cells of w NKD; `classes: others` is NKD as defined."""

    name: Literal["sd-nkd"] = "sd-nkd"
    warmup_epochs: WarmupEpochs = 20.0
    gamma: Weight = 8.0
    classes: Classes = "all"


def sd_nkd(settings: SDNKD, step: Step) -> dict[str, Tensor]:
    """`CE + min(n/20, 1) mean_r( w_r NKD_r )` in epoch n; NKD_r as in `nkd`, of each cell.

    The label loss takes the ordinary logits. Reports what `sd-kd` does.

    Source: Wei et al., "Scale Decoupled Distillation", CVPR 2024. The defaults are its settings for
    most pairs on CIFAR-100: T = 4 and gamma = the beta of DKD, though plain NKD has T = 1 and 1.5
    there, and `classes: all`, because the mask of its published code hides nothing. The paper's own
    text has `classes: others`. The pooling is that of `sd-kd`.
    """
    logits_BC, cells_BRC = student_cells(settings, step)
    at_1_BRC = None
    if step.teachers[0].drops_classes:
        at_1_BRC = teacher_cells(settings, step, temperature=1.0)
    loss = sdd_nkd_loss(
        cells_BRC,
        teacher_cells(settings, step, temperature=settings.temperature),
        majority_labels(*step.labels),
        temperature=settings.temperature,
        gamma=settings.gamma,
        classes=settings.classes,
        complementary_weight=settings.complementary_weight,
        teacher_at_1_BRC=at_1_BRC,
        report=step.metrics,
    )
    factor = step.warm_up(settings.warmup_epochs)
    return {"label": label_term(step, logits_BC), "soft": factor * loss}


def student_cells(settings: CellSettings, step: Step) -> tuple[Tensor, Tensor]:
    """The student's ordinary logits [B, C], and those of its cells [B, R, C], in one forward pass.

    Cells are pooled as the teacher's were. Chained pooling derives coarser cells from the finest
    recorded grid, so the student's are derived from that grid too, even where `scales` omits it.
    """
    teacher = step.teachers[0]
    scales = settings.scales or teacher.scales
    if not _is_chained(teacher):
        cells_BRC = cell_logits(step.student, step.images_B3HW, scales)
        return cells_BRC[:, 0], cells_BRC

    def pool(map_BDHW: Tensor) -> Tensor:
        # A chained whole image is not the plain mean where the finest grid does not divide the
        # map, and the label loss takes the plain one.
        chained_BRD = pool_cells(map_BDHW, teacher.scales, pooling="chained")
        used_BRD = select_cells(chained_BRD, teacher.scales, scales)
        return torch.cat([pool_cells(map_BDHW, (1,)), used_BRD], dim=1)

    both_NC = answer_cells(step.student, step.images_B3HW, pool)
    both_BRC = both_NC.reshape(len(step.images_B3HW), -1, both_NC.shape[-1])
    return both_BRC[:, 0], both_BRC[:, 1:]


def teacher_cells(settings: CellSettings, step: Step, *, temperature: float) -> Tensor:
    """The teacher's logits [B, R, C] of the cells in use, for a temperature."""
    recorded = step.teachers[0].scales
    logits_BRC = step.teacher_logits(temperature=temperature)
    return select_cells(logits_BRC, recorded, settings.scales or recorded)


def select_cells(cells_BRC: Tensor, recorded: Sequence[int], scales: Sequence[int]) -> Tensor:
    """The cells of `scales`, of those of all recorded scales, [B, R, C or D]."""
    if tuple(scales) == tuple(recorded):
        return cells_BRC
    starts = dict(zip(recorded, accumulate((s * s for s in recorded), initial=0), strict=False))
    return torch.cat([cells_BRC.narrow(1, starts[side], side * side) for side in scales], dim=1)


def _is_chained(teacher: TeacherFacts) -> bool:
    """Whether the teacher's whole image may differ from the plain mean of the map."""
    return teacher.pooling == "chained" and teacher.scales != (1,)


def _needs_cells(settings: CellSettings, facts: RunFacts) -> None:
    """A check: the scales are recorded, and the student has cells."""
    teacher = facts.teachers[0]
    missing = [side for side in settings.scales or () if side not in teacher.scales]
    if missing:
        every = str(sorted({*teacher.scales, *missing})).replace(" ", "")
        raise ConfigError(
            f"method.scales is {list(settings.scales or ())}, but {teacher.origin} has "
            f"scales {list(teacher.scales)}.",
            hint=f"Record another cache with `kd-cache build FILE --set scales={every}`.",
        )
    if (settings.scales or teacher.scales) == (1,) and not _is_chained(teacher):
        return
    check_cells(facts.student, facts.input_size, channels=facts.channels, trains=True)


METHODS = (
    Method(SDKD, sd_kd, (needs_one_teacher, _needs_cells, needs_logits_to_standardize)),
    Method(SDDKD, sd_dkd, (needs_one_teacher, _needs_cells, needs_logits_to_standardize)),
    Method(SDNKD, sd_nkd, (needs_one_teacher, _needs_cells)),
)
