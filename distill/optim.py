"""Optimizers and learning rate schedules.

A learning rate is a pure function of the update, so a schedule has no state to save.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from cache_service.config import Frozen
from cache_service.errors import ConfigError

Decay = Annotated[float, Field(ge=0, le=1, description="Weight decay.")]
Rate = Annotated[float, Field(gt=0, le=100, description="Peak learning rate.")]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[
    tuple[Beta, Beta], Field(description="Decay per update of the first and second moment.")
]


class _OptimizerBase(Frozen):
    lr: Rate
    no_decay_bias: Annotated[
        bool, Field(description="Apply no weight decay to biases and normalization layers.")
    ] = False


class SGD(_OptimizerBase):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    momentum: Annotated[Beta, Field(description="Factor of the previous update.")] = 0.9
    nesterov: Annotated[bool, Field(description="Use Nesterov momentum.")] = False
    weight_decay: Decay = 0.0

    @model_validator(mode="after")
    def _check(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov looks ahead along the momentum, which is 0")
        return self


class AdamW(_OptimizerBase):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    betas: Betas = (0.9, 0.999)
    eps: Annotated[
        float, Field(gt=0, le=1, description="Added to the denominator for stability.")
    ] = 1e-8
    weight_decay: Decay = 0.05


OptimizerConfig = Annotated[SGD | AdamW, Field(discriminator="name")]


def make_optimizer(config: SGD | AdamW, model: nn.Module) -> torch.optim.Optimizer:
    """Create the optimizer of all parameters that require gradients.

    Raises:
        ConfigError: no parameter requires a gradient.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("the student has no parameters that can be trained.")
    groups = [{"params": trained, "weight_decay": config.weight_decay}]
    if config.no_decay_bias:
        # One-dimensional parameters are biases and the weights of normalization layers.
        wide = [parameter for parameter in trained if parameter.ndim > 1]
        thin = [parameter for parameter in trained if parameter.ndim <= 1]
        groups[0]["params"] = wide
        groups.append({"params": thin, "weight_decay": 0.0})
        groups = [group for group in groups if group["params"]]
    if isinstance(config, SGD):
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
        )
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter, starting with the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class _ScheduleBase(Frozen):
    warmup_epochs: Annotated[
        float, Field(ge=0, description="Epochs of linear warmup from 0; may be fractional.")
    ] = 0.0


class Constant(_ScheduleBase):
    """A constant learning rate, that of the optimizer."""

    name: Literal["constant"] = "constant"


class Cosine(_ScheduleBase):
    """Half a cosine from the optimizer's learning rate to `min_lr`, computed for each update."""

    name: Literal["cosine"] = "cosine"
    min_lr: Annotated[float, Field(ge=0, description="Learning rate at the end.")] = 0.0


class MultiStep(_ScheduleBase):
    """The learning rate is multiplied by `gamma` at each milestone."""

    name: Literal["multistep"] = "multistep"
    milestones: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...],
        Field(min_length=1, description="Completed epochs; 150 takes effect in epoch 151."),
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
    """Return the learning rate of an update.

    Args:
        schedule: settings of the schedule.
        update: index of the update, from 0.
        peak: learning rate of the optimizer.
        updates_per_epoch: number of updates per epoch.
        epochs: length of the run in epochs.
    """
    warmup = schedule.warmup_epochs * updates_per_epoch
    if update < warmup:
        # The first update already has a rate above 0, because an update at 0 would waste a batch.
        return peak * min((update + 1) / warmup, 1.0)
    if isinstance(schedule, Cosine):
        progress = (update - warmup) / (epochs * updates_per_epoch - warmup)
        weight = 0.5 * (1 + math.cos(math.pi * progress))
        return schedule.min_lr + (peak - schedule.min_lr) * weight
    if isinstance(schedule, MultiStep):
        completed = update // updates_per_epoch
        return peak * schedule.gamma ** sum(mark <= completed for mark in schedule.milestones)
    return peak
