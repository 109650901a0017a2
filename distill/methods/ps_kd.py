"""`ps-kd`: what the student itself said an epoch before softens the labels."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill.losses import label_targets, pskd_alpha, soft_cross_entropy, soften_targets
from distill.methods.base import (
    Method,
    MethodSettings,
    Needs,
    Plan,
    Step,
    needs_unmixed,
    report_top1,
)


class PSKD(MethodSettings):
    """Cross-entropy on (1 - a) label + a x the student's own answer an epoch before; no teacher."""

    name: Literal["ps-kd"] = "ps-kd"
    final_alpha: Annotated[
        float, Field(ge=0, le=1, description="Share of the own answers in the last epoch.")
    ] = 0.8


def ps_kd(settings: PSKD, step: Step) -> dict[str, Tensor]:
    """`CE(z, (1 - a_t) y + a_t p_{t-1})` in epoch t of E, with `a_t = final_alpha t / E`.

    p_{t-1} is the softmax of what the student said in training about its view of the sample in the
    epoch before: a cache that it fills itself, in `own_rows` of `out`. A sample without such an
    answer, as all are in the first epoch, keeps its label. Reports `alpha` and `recalled`, the
    share of samples that have an answer.

    Source: Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV
    2021, and its code. Departure: answers are kept as float16 logits, theirs as probabilities.
    """
    memory, batch = step.memory, step.batch
    assert memory is not None
    logits_BC = step.student(step.images_B3HW)
    epoch = batch.cursor.epoch
    memory.remember(epoch, batch.samples_B, logits_BC.detach())
    past = memory.recall(epoch - 1, batch.samples_B)
    alpha = pskd_alpha(float(epoch), epochs=step.epochs, final=settings.final_alpha)
    targets_BC = label_targets(
        batch.labels_B, num_classes=logits_BC.shape[-1], smoothing=step.label_smoothing
    )
    softened_BC = soften_targets(targets_BC, past.logits_BC, alpha=alpha)
    wanted_BC = torch.where(past.known_B.unsqueeze(-1), softened_BC, targets_BC)
    report_top1(step, logits_BC)
    step.metrics["alpha"] = torch.full((), alpha, device=logits_BC.device)
    step.metrics["recalled"] = past.known_B.float().mean()
    return {"label": soft_cross_entropy(logits_BC, wanted_BC)}


def check(settings: PSKD, plan: Plan) -> None:
    """No mixing: partners are others each epoch."""
    needs_unmixed(settings, plan, why="recalls its answer to each sample")


METHOD = Method(PSKD, ps_kd, check, needs=lambda _: Needs(memory=True))
