"""`ensemble`: soft targets from the average of several teachers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from distill.losses import ensemble_logits, kd_loss
from distill.losses.ensemble import EnsembleMean
from distill.methods.fields import Share, Temperature
from distill.methods.method import Method, RunFacts, Step, label_term, needs_teachers
from distill.methods.standardized import StandardizeSettings, needs_spread, standardized


class Ensemble(StandardizeSettings):
    """(1 - alpha) label loss + alpha T**2 KL(average of the teachers || student) at T."""

    name: Literal["ensemble"] = "ensemble"
    temperature: Temperature = 4.0
    alpha: Share = 0.9
    mean: Annotated[
        EnsembleMean,
        Field(description="arithmetic: of probabilities at T; geometric: of logits."),
    ] = "arithmetic"


def ensemble(settings: Ensemble, step: Step) -> dict[str, Tensor]:
    """`(1 - alpha) CE + alpha T**2 KL(mean_i p(v_i; T) || p(z; T))` over all of `caches`.

    Where teachers disagree this asks for one distribution between them, while `soft` asks for all
    of theirs at once: the same gradients under the arithmetic mean, other values. `standardize`
    z-scores the student's logits and each member's first, so that none outshouts the others.

    Source: Hinton et al. 2015, section 1, which allows for both means; T and alpha as in `kd`.
    """
    logits_BC = step.student(step.images_B3HW)
    members = [
        step.teacher_logits(temperature=settings.temperature, cache=index)[:, 0]
        for index in range(len(step.teachers))
    ]
    (student_BC,) = standardized(settings, logits_BC)
    teacher_BC = ensemble_logits(
        standardized(settings, *members), temperature=settings.temperature, mean=settings.mean
    )
    soft = kd_loss(student_BC, teacher_BC, temperature=settings.temperature)
    return {
        "label": (1 - settings.alpha) * label_term(step, logits_BC),
        "soft": settings.alpha * soft,
    }


def check(settings: Ensemble, facts: RunFacts) -> None:
    """Teachers; all of their logits where they are standardized."""
    needs_teachers(settings, facts)
    needs_spread(settings, facts)


METHOD = Method(Ensemble, ensemble, (check,))
