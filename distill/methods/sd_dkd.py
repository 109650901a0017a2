"""`sd-dkd`: decoupled distillation cell by cell."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.losses import nckd_rows, tckd_rows
from distill.methods.cells import needs_cells
from distill.methods.decoupled import DecoupledSettings, decouple
from distill.methods.fields import Weight
from distill.methods.method import Method, RunFacts, Step, label_term
from distill.methods.standardized import StandardizeSettings, needs_spread, standardized
from distill.methods.warmup import warm_up_factor


class SDDKD(DecoupledSettings, StandardizeSettings):
    """Label loss + warm-up x mean over cells of w (alpha TCKD + beta NCKD)."""

    name: Literal["sd-dkd"] = "sd-dkd"
    alpha: Weight = 1.0
    beta: Weight = 8.0


def sd_dkd(settings: SDDKD, step: Step) -> dict[str, Tensor]:
    """`CE + min(n/20, 1) mean_r( w_r (alpha TCKD_r + beta NCKD_r) )` in epoch n.

    The label loss takes the ordinary logits; the label is every cell's target, of a mixed view
    its larger part. Reports what `sd-kd` does, and the means of TCKD and NCKD over all cells,
    without their weights, as `tckd` and `nckd`. `standardize` z-scores each cell's
    logits on both sides first.

    Source: Wei et al., "Scale Decoupled Distillation", CVPR 2024; defaults of its published code:
    T = 4, alpha 1, w = 2 for complementary cells, 20 epochs of warm-up; beta as in `dkd`.
    Departures: those of `sdd_dkd_loss`.
    """
    cells = decouple(settings, step)
    student_BRC, teacher_BRC = standardized(settings, cells.student_BRC, cells.teacher_BRC)
    rows = (student_BRC, teacher_BRC, cells.labels_B1)
    tckd_BR = tckd_rows(*rows, temperature=settings.temperature)
    nckd_BR = nckd_rows(*rows, temperature=settings.temperature)
    step.metrics.update(tckd=tckd_BR.detach().mean(), nckd=nckd_BR.detach().mean())
    soft = (cells.weights_BR * (settings.alpha * tckd_BR + settings.beta * nckd_BR)).mean()
    return {
        "label": label_term(step, cells.logits_BC),
        "soft": warm_up_factor(step, epochs=settings.warmup_epochs) * soft,
    }


def check(settings: SDDKD, facts: RunFacts) -> None:
    """One teacher with cells; all of its logits where they are standardized."""
    needs_cells(settings, facts)
    needs_spread(settings, facts)


METHOD = Method(SDDKD, sd_dkd, (check,))
