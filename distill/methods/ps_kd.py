"""`ps-kd`: what the student itself said an epoch before softens the labels."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill.losses import label_targets, pskd_alpha, soft_cross_entropy, soften_targets
from distill.methods.method import (
    Method,
    MethodSettings,
    RunFacts,
    Step,
    needs_unmixed,
    report_top1,
)
from distill.methods.requirements import Requirements


class PSKD(MethodSettings):
    """Cross-entropy on (1 - a) label + a x the student's own answer an epoch before; no teacher."""

    name: Literal["ps-kd"] = "ps-kd"
    final_alpha: Annotated[
        float, Field(ge=0, le=1, description="Share of the own answers in the last epoch.")
    ] = 0.8


def ps_kd(settings: PSKD, step: Step) -> dict[str, Tensor]:
    """`CE(z, (1 - a_t) y + a_t p_{t-1})` in epoch t of E, with `a_t = final_alpha t / E`.

    p_{t-1} is the softmax of what the student predicted in training for its view of the sample in
    the epoch before, which is kept in `prediction_history` of `out`. A sample without a past
    prediction, as all are in the first epoch, keeps its label. Reports `alpha` and `recalled`, the
    fraction of samples that have one.

    Source: Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV
    2021, and its code. Departure: answers are kept as float16 logits, theirs as probabilities.
    """
    assert step.history is not None
    logits_BC = step.student(step.images_B3HW)
    epoch = math.floor(step.epoch)
    step.history.write(epoch, step.samples_B, logits_BC.detach())
    past = step.history.read(epoch - 1, step.samples_B)
    alpha = pskd_alpha(float(epoch), epochs=step.epochs, final=settings.final_alpha)
    targets_BC = label_targets(
        step.labels.labels_B, num_classes=logits_BC.shape[-1], smoothing=step.label_smoothing
    )
    softened_BC = soften_targets(targets_BC, past.logits_BC, alpha=alpha)
    wanted_BC = torch.where(past.known_B.unsqueeze(-1), softened_BC, targets_BC)
    report_top1(step, logits_BC)
    step.metrics["alpha"] = torch.full((), alpha, device=logits_BC.device)
    step.metrics["recalled"] = past.known_B.float().mean()
    return {"label": soft_cross_entropy(logits_BC, wanted_BC)}


def check(settings: PSKD, facts: RunFacts) -> None:
    """No mixing: partners are others each epoch."""
    needs_unmixed(settings, facts, why="recalls its answer to each sample")


METHOD = Method(PSKD, ps_kd, (check,), lambda _: Requirements(prediction_history=True))
