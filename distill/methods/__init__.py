"""Every method by name. A new one is a function in the file of its family and a line in `METHODS`.

The families are modules of this package; `_FAMILIES` lists those that are registered.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from distill.methods import (
    decoupled,
    kd,
    multi_teacher,
    peers,
    scale_decoupled,
    self_distillation,
    specialist,
)
from distill.methods.method import (
    Method,
    MethodSettings,
    OtherViews,
    PeerLogits,
    RunFacts,
    Step,
    TeacherFacts,
    ViewLabels,
)
from distill.methods.prediction_history import PredictionHistory
from distill.methods.requirements import Requirements, ViewSelection, combine_requirements
from distill.methods.setting_types import with_schedules

# fmt: off
__all__ = [
    "METHODS", "Method", "MethodConfig", "MethodSettings", "OtherViews", "PeerLogits",
    "PredictionHistory", "Requirements", "RunFacts", "Step", "TeacherFacts", "ViewLabels",
    "ViewSelection", "method_of", "requirements_of",
]
# fmt: on

_FAMILIES = (
    kd,
    decoupled,
    scale_decoupled,
    multi_teacher,
    self_distillation,
    peers,
    specialist,
)

METHODS: dict[str, Method] = {
    method.name: with_schedules(method) for family in _FAMILIES for method in family.METHODS
}

if TYPE_CHECKING:
    MethodConfig = MethodSettings
else:
    _choices: Any = reduce(or_, (method.settings for method in METHODS.values()))
    MethodConfig = Annotated[_choices, Field(discriminator="name")]
    """`method:` of a train file: the settings of the method with that `name`."""


def method_of(settings: MethodSettings) -> Method:
    """The method whose settings these are."""
    return METHODS[settings.name]


def requirements_of(*settings: MethodSettings) -> Requirements:
    """The combined requirements of the methods with these settings.

    Raises:
        ConfigError: they require epochs of different samples.
    """
    return combine_requirements(
        [(each.name, method_of(each).requirements(each)) for each in settings]
    )
