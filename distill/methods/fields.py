"""Types that the settings of several methods share, so that a bound stands in one place.

Those of `scheduled` take a number, or a `Schedule` of numbers within the same bounds. A method is
only ever handed the number of the step: see `distill.methods.schedules`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidatorFunctionWrapHandler, WrapValidator

from distill.losses.nkd import SoftClasses
from distill.methods.schedules import Schedule


def scheduled(number: Any) -> Any:
    """The type of a setting that is a number or moves between two of them.

    Args:
        number: a float, annotated with its bounds.
    """
    plain, moving = TypeAdapter(number), TypeAdapter(Schedule[number])

    def choose(written: Any, _union: ValidatorFunctionWrapHandler) -> Any:
        # By what is written: a plain union would report what is wrong with it as either form.
        if isinstance(written, Schedule):
            written = written.model_dump()
        if isinstance(written, bool):  # which would count as 0 or 1
            raise ValueError(f"should be a number or a schedule, got {str(written).lower()}")
        return (moving if isinstance(written, dict) else plain).validate_python(written)

    return Annotated[number | Schedule, WrapValidator(choose)]


if TYPE_CHECKING:
    Temperature = float
    Share = float
    Weight = float
    ComplementaryWeight = float
else:
    Temperature = Annotated[
        scheduled(Annotated[float, Field(gt=0, le=1000)]),
        Field(description="Divides logits before the softmax."),
    ]
    Share = Annotated[
        scheduled(Annotated[float, Field(ge=0, le=1)]),
        Field(description="Share of the teacher; labels get the rest."),
    ]
    Weight = Annotated[
        scheduled(Annotated[float, Field(ge=0, le=1000)]), Field(description="Factor of a term.")
    ]
    ComplementaryWeight = Annotated[
        scheduled(Annotated[float, Field(ge=0, le=100)]),
        Field(description="Of a cell that contradicts the whole image."),
    ]

WarmupEpochs = Annotated[
    float, Field(ge=0, le=100_000, description="Epochs until the teacher has its full weight.")
]
Standardize = Annotated[
    bool, Field(description="Give the logits of both sides mean 0 and spread 1 first.")
]
Classes = Annotated[
    SoftClasses, Field(description="The soft term's: others than the label, or all.")
]
