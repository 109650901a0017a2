"""`sd-nkd`: normalized distillation cell by cell."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.losses.nkd import nkd_rows
from distill.methods.cells import needs_cells
from distill.methods.decoupled import DecoupledSettings, decouple, teacher_cells
from distill.methods.fields import Classes, Weight
from distill.methods.method import Method, Step, depends_on_temperature, label_term
from distill.methods.warmup import warm_up_factor


class SDNKD(DecoupledSettings):
    """Label loss + warm-up x mean over cells of w NKD; `classes: others` is NKD as defined."""

    name: Literal["sd-nkd"] = "sd-nkd"
    gamma: Weight = 8.0
    classes: Classes = "all"


def sd_nkd(settings: SDNKD, step: Step) -> dict[str, Tensor]:
    """`CE + min(n/20, 1) mean_r( w_r NKD_r )` in epoch n; NKD_r as in `nkd`, of each cell.

    The label loss takes the ordinary logits. Reports what `sd-kd` does.

    Source: Wei et al., "Scale Decoupled Distillation", CVPR 2024. The defaults are what made its
    tables: T = 4 and gamma = the beta of DKD, though plain NKD has T = 1 and 1.5 there, and
    `classes: all`, because the mask of its published code hides nothing. The paper's own text has
    `classes: others`.
    """
    cells = decouple(settings, step)
    at_1_BRC = None
    if depends_on_temperature(step):
        at_1_BRC = teacher_cells(settings, step, temperature=1.0)
    rows_BR = nkd_rows(
        cells.student_BRC,
        cells.teacher_BRC,
        cells.labels_B1,
        temperature=settings.temperature,
        gamma=settings.gamma,
        classes=settings.classes,
        teacher_at_1_XC=at_1_BRC,
    )
    soft = (cells.weights_BR * rows_BR).mean()
    return {
        "label": label_term(step, cells.logits_BC),
        "soft": warm_up_factor(step, epochs=settings.warmup_epochs) * soft,
    }


METHOD = Method(SDNKD, sd_nkd, (needs_cells,))
