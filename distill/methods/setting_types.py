"""Types of settings that several methods share, and settings that change during training.

A temperature, fraction or weight is a number or a `Schedule` of numbers within the same bounds. A
method is only ever called with numbers: `with_schedules` replaces each schedule by its value at the
step, so whatever depends on a temperature follows it, such as the logits of dropped classes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, TypeAdapter, WrapValidator, model_validator
from torch import Tensor

from cache_service.config import Frozen
from distill.losses import SoftClasses, standardize_logits
from distill.methods.method import Method, MethodSettings, Step

NumberT = TypeVar("NumberT", bound=float)


class Schedule(Frozen, Generic[NumberT]):
    """A value that moves from `start` to `end` during the first `epochs`, step by step, and stays.

    `constant` stays at `start` and is equivalent to that number.
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
            return self.start
        progress = min(max(epoch / self.epochs, 0.0), 1.0)
        if self.schedule == "linear":
            return (1.0 - progress) * self.start + progress * self.end
        # Half a cosine, flat at both ends.
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
        return remaining * self.start + (1.0 - remaining) * self.end


def with_schedules(method: Method) -> Method:
    """The method, with settings that may be schedules.

    The present value of each schedule is reported under its own name, such as `temperature`.
    """

    @wraps(method.terms)
    def terms(settings: MethodSettings, step: Step) -> dict[str, Tensor]:
        present = {
            name: value.at(step.epoch) for name, value in settings if isinstance(value, Schedule)
        }
        for name, value in present.items():
            # Filled in on the device: copying a number there would wait for the device.
            step.metrics[name] = torch.full((), value, device=step.images_B3HW.device)
        return method.terms(settings.model_copy(update=present) if present else settings, step)

    return replace(method, terms=terms)


def number_or_schedule(number: Any) -> Any:
    """The type of a setting that is a number, given as a type with bounds, or a schedule."""
    plain, moving = TypeAdapter(number), TypeAdapter(Schedule[number])

    def choose(written: Any, _union: Any) -> Any:
        # By the form that is written: a plain union would report the errors of both forms.
        if isinstance(written, Schedule):
            written = written.model_dump()
        if isinstance(written, bool):  # which would count as 0 or 1
            raise ValueError(f"should be a number or a schedule, got {str(written).lower()}")
        return (moving if isinstance(written, dict) else plain).validate_python(written)

    return Annotated[number | Schedule, WrapValidator(choose)]


if TYPE_CHECKING:
    Temperature = float
    Fraction = float
    Weight = float
    ComplementaryWeight = float
else:
    Temperature = Annotated[
        number_or_schedule(Annotated[float, Field(gt=0, le=1000)]),
        Field(description="Divides logits before the softmax."),
    ]
    Fraction = Annotated[
        number_or_schedule(Annotated[float, Field(ge=0, le=1)]),
        Field(description="Weight of the teacher; the label loss gets the rest."),
    ]
    Weight = Annotated[
        number_or_schedule(Annotated[float, Field(ge=0, le=1000)]),
        Field(description="Factor of a term."),
    ]
    ComplementaryWeight = Annotated[
        number_or_schedule(Annotated[float, Field(ge=0, le=100)]),
        Field(description="Of a cell whose prediction contradicts that of the whole image."),
    ]

WarmupEpochs = Annotated[
    float, Field(ge=0, le=100_000, description="Epochs until the teacher has its full weight.")
]
Classes = Annotated[
    SoftClasses, Field(description="The soft term's: others than the label, or all.")
]


class StandardizeSettings(MethodSettings):
    """Settings of the methods that logit standardization was published for.

    Self-distillation and peers were not among them; `hard` uses predictions, which standardization
    does not change; `nkd` weighs by the teacher's confidence, which it removes; `dist` compares
    correlations, and `logits` has no softmax.
    """

    standardize: Annotated[
        bool,
        Field(description="Give the logits of both sides mean 0 and standard deviation 1 first."),
    ] = False

    def standardized(self, *sides: Tensor) -> tuple[Tensor, ...]:
        """Logits [..., C] of all sides, as z-scores where `standardize` is set."""
        return tuple(map(standardize_logits, sides)) if self.standardize else sides
