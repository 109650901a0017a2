"""`tf-kd`: no better teacher: a virtual one that is nearly always right, or the student's copy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from distill.losses import kd_loss, majority_labels, virtual_teacher_loss
from distill.methods.fields import Share, Temperature
from distill.methods.method import (
    Method,
    MethodSettings,
    RunFacts,
    Step,
    label_term,
    needs_one_teacher,
)

PUBLISHED: dict[str, dict[str, float | None]] = {
    "virtual": {"temperature": 20.0, "alpha": 0.1, "correct": 0.99},
    "self": {"temperature": 6.0, "alpha": 0.905, "correct": None},
}
"""Settings of ResNet-18 on CIFAR-100. For `self` that code has 0.95 x 50 / C x KL against 0.05 CE:
9.5 to 1 at C = 100, as 0.905 against 0.095 here; its two weights add up to 0.525, so the
loss here is 1.9 times as large."""


class TfKD(MethodSettings):
    """(1 - alpha) label loss + alpha x a teacher that needs no better network."""

    name: Literal["tf-kd"] = "tf-kd"
    form: Annotated[
        Literal["virtual", "self"],
        Field(description="self: the cache of a network like the student, trained before."),
    ] = "virtual"
    temperature: Temperature = 20.0
    alpha: Share = 0.1
    correct: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Virtual teacher's probability of the label."),
    ] = 0.99

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, written: Any) -> Any:
        """What is not written is as published for the form that is."""
        if not isinstance(written, dict):
            return written
        return PUBLISHED.get(str(written.get("form", "virtual")), {}) | written

    @model_validator(mode="after")
    def _check(self) -> TfKD:
        if (self.form == "virtual") != (self.correct is not None):
            raise ValueError(
                f"correct={self.correct} with form={self.form}: the virtual teacher has such a "
                "probability, and only it"
            )
        return self


def tf_kd(settings: TfKD, step: Step) -> dict[str, Tensor]:
    """`(1 - alpha) CE + alpha L`, L by `form`.

    virtual: `KL(softmax(u / T) || softmax(z))`, u the probabilities `correct` for the label (of a
    mixed view, its larger part) and the rest spread evenly. No cache is read.
    self: `T**2 KL(p(v; T) || p(z; T))`, which is `kd`, from the cache of a trained copy of the
    student.

    Source: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization",
    CVPR 2020, Tf-KD reg and Tf-KD self. Departures of its code from its paper, followed here:
    those of `virtual_teacher_loss`.
    """
    logits_BC = step.student(step.images_B3HW)
    if settings.form == "self":
        teacher_BC = step.teacher_logits(temperature=settings.temperature)[:, 0]
        soft = kd_loss(logits_BC, teacher_BC, temperature=settings.temperature)
    else:
        assert settings.correct is not None
        soft = virtual_teacher_loss(
            logits_BC,
            majority_labels(*step.labels),
            correct=settings.correct,
            temperature=settings.temperature,
        )
    return {
        "label": (1 - settings.alpha) * label_term(step, logits_BC),
        "soft": settings.alpha * soft,
    }


def check(settings: TfKD, facts: RunFacts) -> None:
    """A teacher for the form that has one; the virtual form reads none, whatever `caches` says."""
    if settings.form == "self":
        needs_one_teacher(settings, facts)


METHOD = Method(TfKD, tf_kd, (check,))
