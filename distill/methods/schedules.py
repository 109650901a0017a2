"""Temperatures and weights that move while a student learns.

A method never sees a schedule: it is handed settings in which each has its value of the step, so
that whatever depends on a temperature, such as what a teacher's dropped classes are given, follows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import Annotated, Generic, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cache_service.format.frozen import Frozen
from distill.losses.schedules import constant, cosine, linear
from distill.methods.method import Method, SettingsT, Step

NumberT = TypeVar("NumberT", bound=float)


class Schedule(Frozen, Generic[NumberT]):
    """A value that goes from `start` to `end` in the first `epochs`, step by step, and stays.

    `constant` stays at `start` and is that number.
    """

    schedule: Literal["linear", "cosine", "constant"]
    start: NumberT
    end: Annotated[NumberT | None, Field(description="Not for constant.")] = None
    epochs: Annotated[float | None, Field(gt=0, le=100_000, description="Not for constant.")] = None

    @model_validator(mode="after")
    def _check(self) -> Schedule[NumberT]:
        if self.schedule == "constant":
            if self.end not in (None, self.start):
                raise ValueError(
                    f"schedule: constant stays at start={self.start:g}, but end={self.end:g}"
                )
        elif self.end is None or self.epochs is None:
            raise ValueError(f"schedule: {self.schedule} needs start, end and epochs")
        return self

    def at(self, epoch: float) -> float:
        """The value at a fractional epoch, 0.0 at the start of training."""
        if self.end is None or self.epochs is None or self.schedule == "constant":
            return constant(epoch, value=self.start)
        course = {"linear": linear, "cosine": cosine}[self.schedule]
        return course(epoch, start=self.start, end=self.end, epochs=self.epochs)


def with_schedules(method: Method[SettingsT]) -> Method[SettingsT]:
    """The method, with settings that may move.

    Each that does is reported under its own name, such as `temperature`.
    """

    @wraps(method.terms)
    def terms(settings: SettingsT, step: Step) -> dict[str, Tensor]:
        present = {
            name: value.at(step.epoch) for name, value in settings if isinstance(value, Schedule)
        }
        if not present:
            return method.terms(settings, step)
        # Filled in on the device: copying a number there would wait for it.
        shown = {
            name: torch.full((), value, device=step.images_B3HW.device)
            for name, value in present.items()
        }
        step.metrics.update(shown)
        return method.terms(settings.model_copy(update=present), step)

    return replace(method, terms=terms)
