"""Learning rates as a pure function of the update: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator

from cache_service.config import Frozen


class _ScheduleBase(Frozen):
    warmup_epochs: Annotated[
        float, Field(ge=0, description="Straight up from 0; may be a part of an epoch.")
    ] = 0.0


class Constant(_ScheduleBase):
    """The optimizer's learning rate throughout."""

    name: Literal["constant"] = "constant"


class Cosine(_ScheduleBase):
    """Half a cosine from the optimizer's learning rate to `min_lr`, one value per update."""

    name: Literal["cosine"] = "cosine"
    min_lr: Annotated[float, Field(ge=0, description="Learning rate at the end.")] = 0.0


class MultiStep(_ScheduleBase):
    """Times `gamma` after each milestone."""

    name: Literal["multistep"] = "multistep"
    milestones: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...],
        Field(min_length=1, description="Epochs completed; 150 acts from the 151st epoch on."),
    ]
    gamma: Annotated[float, Field(gt=0, lt=1, description="Factor at each milestone.")] = 0.1

    @field_validator("milestones")
    @classmethod
    def _check_milestones(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if list(milestones) != sorted(set(milestones)):
            raise ValueError(f"milestones must strictly increase, got {list(milestones)}")
        return milestones


ScheduleConfig = Annotated[Constant | Cosine | MultiStep, Field(discriminator="name")]


def learning_rate(
    schedule: Constant | Cosine | MultiStep,
    update: int,
    *,
    peak: float,
    updates_per_epoch: int,
    epochs: int,
) -> float:
    """Learning rate of an update.

    Args:
        schedule: the settings.
        update: 0 for the first of the run.
        peak: the optimizer's learning rate.
        updates_per_epoch: to turn updates into epochs.
        epochs: length of the run.
    """
    warmup = schedule.warmup_epochs * updates_per_epoch
    if update < warmup:
        # From the first step on the rate is above 0: an update at 0 would be a batch wasted.
        return peak * min((update + 1) / warmup, 1.0)
    if isinstance(schedule, Cosine):
        progress = (update - warmup) / (epochs * updates_per_epoch - warmup)
        share = 0.5 * (1 + math.cos(math.pi * progress))
        return schedule.min_lr + (peak - schedule.min_lr) * share
    if isinstance(schedule, MultiStep):
        completed = update // updates_per_epoch
        return peak * schedule.gamma ** sum(mark <= completed for mark in schedule.milestones)
    return peak
