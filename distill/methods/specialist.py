"""`specialist`: a student that distinguishes some confusable classes, and all others from those."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from cache_service.errors import ConfigError
from distill.losses import dustbin_labels, dustbin_logits, specialist_terms
from distill.methods.checks import needs_one_teacher, needs_unmixed
from distill.methods.method import Method, MethodSettings, RunFacts, Step
from distill.methods.requirements import Requirements
from distill.methods.setting_types import Fraction, Temperature


class Specialist(MethodSettings):
    """(1 - alpha) label loss + alpha T**2 KL(generalist || specialist), over S classes and rest."""

    name: Literal["specialist"] = "specialist"
    classes: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**31)], ...],
        Field(min_length=2, description="The confusable ones; all others are one, the dustbin."),
    ]
    temperature: Temperature = 4.0
    alpha: Fraction = 0.5

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, classes: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(classes)) != len(classes):
            raise ValueError(f"classes must be distinct, got {list(classes)}")
        return classes


def specialist(settings: Specialist, step: Step) -> dict[str, Tensor]:
    """`(1 - alpha) CE + alpha T**2 KL` over the outputs of `classes` and a dustbin for all others.

    The student keeps an output for each class, so it may start from the generalist's weights
    (`student.checkpoint`) and be saved, evaluated and recorded as any other; its dustbin is the
    log-sum-exp of the outputs outside `classes`. The generalist is the teacher in `caches`. An
    epoch is every sample of `classes` and as many drawn from the others, new ones each epoch. The
    oversampling of `classes` is stored in the checkpoint and corrected at inference: see
    `distill.specialists`. `top1` counts the dustbin as one class. In the soft term both sides are
    folded at its T, so the term is 0 for a student with the generalist's logits.

    Source: Hinton et al. 2015, sections 5.2, 5.3 and 6.1. They leave T and alpha open.
    """
    subset = torch.tensor(settings.classes, device=step.images_B3HW.device)
    logits_BC = step.student(step.images_B3HW)
    logits_BS = dustbin_logits(logits_BC, subset)
    labels_B = dustbin_labels(step.labels.labels_B, subset)
    step.metrics["top1"] = (logits_BS.detach().argmax(dim=-1) == labels_B).float().mean()
    label, soft = specialist_terms(
        logits_BS,
        dustbin_logits(logits_BC, subset, temperature=settings.temperature),
        step.teacher_logits(temperature=settings.temperature)[:, 0],
        step.labels.labels_B,
        subset,
        temperature=settings.temperature,
        alpha=settings.alpha,
        smoothing=step.label_smoothing,
    )
    return {"label": label, "soft": soft}


def _check(settings: Specialist, facts: RunFacts) -> None:
    """One generalist, no mixing, and classes that exist and are not all."""
    needs_one_teacher(settings, facts)
    needs_unmixed(settings, facts, why="draws samples of its classes")
    if max(settings.classes) >= facts.num_classes or len(settings.classes) >= facts.num_classes:
        raise ConfigError(
            f"method.classes={list(settings.classes)} of {facts.num_classes} classes: a specialist "
            f"has some of 0 to {facts.num_classes - 1}, and leaves at least one out."
        )


METHODS = (
    Method(
        Specialist, specialist, (_check,), lambda each: Requirements(special_classes=each.classes)
    ),
)
