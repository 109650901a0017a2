"""`ddgsd`: two views of each sample, through one network, teach each other."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill.losses import SelfView, ddgsd_terms, kd_loss, label_targets
from distill.methods.features import answer_with_features, needs_features
from distill.methods.fields import Temperature, Weight
from distill.methods.method import (
    Method,
    MethodSettings,
    RunFacts,
    Step,
    needs_one_teacher,
    needs_unmixed,
    report_top1,
)
from distill.methods.requirements import Requirements, SecondView


class DDGSD(MethodSettings):
    """Label losses of both views + consistency x KL each way + mmd x distance of mean features."""

    name: Literal["ddgsd"] = "ddgsd"
    temperature: Annotated[Temperature, Field(description="Of the views' KL.")] = 1.0
    consistency: Annotated[Weight, Field(description="Of the views' KL, lambda in the paper.")] = (
        1.0
    )
    mmd: Annotated[Weight, Field(description="Of the features, mu in the paper.")] = 5e-4
    teacher_temperature: Annotated[Temperature, Field(description="Of a cached teacher.")] = 4.0
    teacher_weight: Annotated[
        Weight, Field(description="Of a cached teacher, where there is one, on each view.")
    ] = 1.0


def ddgsd(settings: DDGSD, step: Step) -> dict[str, Tensor]:
    """`CE_a + CE_b + consistency T**2 (KL(a || b) + KL(b || a)) + mmd |mean h(a) - mean h(b)|**2`.

    a is a sample's view under the epoch's seed, b its view under another: see
    `distill.methods.requirements.other_seed`. Both go through the network in one batch, and
    gradients flow into both. h are the features that the classifier reads. Where `caches` names a
    teacher, its logits of both views are used: `+ teacher_weight T'**2 (KL(v_a || a) + KL(v_b ||
    b))` at T' = `teacher_temperature`. Without one, two seeds of `augment` give the pair.

    Source: Xu & Liu, "Data-Distortion Guided Self-Distillation for Deep Neural Networks", AAAI
    2019: T = 1, consistency 1, mmd 1e-4 to 5e-4, no teacher. Departures: those of `ddgsd_terms`.
    """
    second = step.other_views(SecondView)
    both = answer_with_features(step.student, torch.cat([step.images_B3HW, second.images_B3HW]))
    logits_a_BC, logits_b_BC = both.logits_BC.chunk(2)
    features_a_BD, features_b_BD = both.features_BD.chunk(2)
    targets_BC = label_targets(
        step.labels.labels_B, num_classes=logits_a_BC.shape[-1], smoothing=step.label_smoothing
    )
    report_top1(step, logits_a_BC)
    found = ddgsd_terms(
        SelfView(logits_a_BC, features_a_BD, targets_BC),
        SelfView(logits_b_BC, features_b_BD, targets_BC),
        temperature=settings.temperature,
    )
    terms = {
        "label_a": found.label_a,
        "label_b": found.label_b,
        "kl_ab": settings.consistency * found.kl_ab,
        "kl_ba": settings.consistency * found.kl_ba,
        "mmd": settings.mmd * found.mmd,
    }
    if step.teachers:
        hot = settings.teacher_temperature
        for name, logits_BC, views in (
            ("a", logits_a_BC, step),
            ("b", logits_b_BC, second),
        ):
            teacher_BC = views.teacher_logits(temperature=hot)[:, 0]
            soft = kd_loss(logits_BC, teacher_BC, temperature=hot)
            terms[f"soft_{name}"] = settings.teacher_weight * soft
    return terms


def check(settings: DDGSD, facts: RunFacts) -> None:
    """No mixing, a student with features, and one teacher at most."""
    needs_unmixed(settings, facts, why="compares two views of each sample")
    if facts.teachers:
        needs_one_teacher(settings, facts)
    needs_features(settings, facts)


METHOD = Method(DDGSD, ddgsd, (check,), lambda _: Requirements(other_views=(SecondView,)))
