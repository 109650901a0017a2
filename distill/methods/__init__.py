"""Every method by name. A new one is one file beside these and one line in `_REGISTERED`."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from distill.methods import (
    ce,
    cs_kd,
    ddgsd,
    dist,
    dkd,
    ensemble,
    hard,
    kd,
    logits,
    nkd,
    peers,
    ps_kd,
    sd_dkd,
    sd_kd,
    sd_nkd,
    soft,
    specialist,
    tf_kd,
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
from distill.methods.schedules import with_schedules

__all__ = [
    "METHODS",
    "Method",
    "MethodConfig",
    "MethodSettings",
    "OtherViews",
    "PeerLogits",
    "PredictionHistory",
    "Requirements",
    "RunFacts",
    "Step",
    "TeacherFacts",
    "ViewLabels",
    "ViewSelection",
    "method_of",
    "requirements_of",
]

_REGISTERED: tuple[Method[Any], ...] = (
    ce.METHOD,
    kd.METHOD,
    sd_kd.METHOD,
    dkd.METHOD,
    sd_dkd.METHOD,
    nkd.METHOD,
    sd_nkd.METHOD,
    logits.METHOD,
    soft.METHOD,
    hard.METHOD,
    ensemble.METHOD,
    dist.METHOD,
    tf_kd.METHOD,
    ddgsd.METHOD,
    ps_kd.METHOD,
    cs_kd.METHOD,
    specialist.METHOD,
    peers.METHOD,
)

METHODS: dict[str, Method[Any]] = {method.name: with_schedules(method) for method in _REGISTERED}

if TYPE_CHECKING:
    MethodConfig = MethodSettings
else:
    _choices: Any = reduce(or_, (method.settings for method in _REGISTERED))
    MethodConfig = Annotated[_choices, Field(discriminator="name")]
    """`method:` of a train file: the settings of the method that `name` says."""


def method_of(settings: MethodSettings) -> Method[Any]:
    """The method whose settings these are."""
    return METHODS[settings.name]


def requirements_of(*settings: MethodSettings) -> Requirements:
    """The combined requirements of the methods with these settings.

    Raises:
        ConfigError: they require epochs of different samples.
    """
    return combine_requirements(
        (each.name, method_of(each).requirements(each)) for each in settings
    )
