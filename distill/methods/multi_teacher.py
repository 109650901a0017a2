"""Several teachers, matched one by one or averaged: `soft`, `hard` and `ensemble`.

A student may have one head for labels and others for teachers; those with one head for everything
use it for both. Shape letters: B batch, C classes.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor, nn

from cache_service.errors import ConfigError
from distill.losses import (
    Direction,
    EnsembleMean,
    ensemble_logits,
    kd_loss,
    multi_teacher_hard_loss,
    multi_teacher_soft_loss,
)
from distill.methods.checks import needs_logits_to_standardize, needs_teachers
from distill.methods.method import (
    Method,
    MethodSettings,
    RunFacts,
    Step,
    label_and_soft,
    label_term,
)
from distill.methods.setting_types import Fraction, StandardizeSettings, Temperature


class HeadLogits(NamedTuple):
    """A student's logits, head by head, each [B, C].

    Attributes:
        label_BC: of the head that learns from labels.
        teachers: of the heads that learn from teachers: one for all of them, or one for each.
    """

    label_BC: Tensor
    teachers: tuple[Tensor, ...]


@runtime_checkable
class HeadedStudent(Protocol):
    """A network with heads for teachers beside the one for labels.

    Its plain forward pass returns [B, C] logits like any other network's, in every mode: the
    average of all of its heads. `distill.tokens` makes vision transformers of this kind.
    """

    num_teacher_heads: int

    def forward_heads(self, images_B3HW: Tensor) -> HeadLogits:
        """Every head's logits of a batch."""
        ...


class HeadSettings(MethodSettings):
    """Settings shared by the methods that match several teachers one by one."""

    heads: Annotated[
        Literal["any", "shared", "each"],
        Field(
            description="Refuse a student that does not have one head for all teachers (shared), "
            "or one for each of them (each)."
        ),
    ] = "any"


class Soft(HeadSettings, StandardizeSettings):
    """(1 - alpha) label loss + alpha T**2 / n sum_i KL(teacher_i || head_i) at T."""

    name: Literal["soft"] = "soft"
    temperature: Temperature = 3.0
    alpha: Fraction = 0.1
    direction: Annotated[
        Direction, Field(description="forward: KL(teacher || student); reverse: the other way.")
    ] = "forward"


def soft(settings: Soft, step: Step) -> dict[str, Tensor]:
    """`(1 - alpha) CE(z) + alpha T**2 / n sum_i KL(p(v_i; T) || p(z_i; T))` over all of `caches`.

    z is the student's label head; z_i its head for teacher i, the one that all teachers share, or
    z itself in a student without heads for teachers. `standardize` z-scores all z_i and v_i first.

    Source: Touvron et al., "Training data-efficient image transformers", ICML 2021, with n
    teachers; T = 3 and alpha 0.1 there. Departure: that code averages the KL over classes too, so
    its alpha weighs C times less than this one.
    """
    student = logits_of_heads(step.student, step.images_B3HW)
    loss = multi_teacher_soft_loss(
        settings.standardized(*student.teachers),
        settings.standardized(*_every_teacher(step, temperature=settings.temperature)),
        temperature=settings.temperature,
        direction=settings.direction,
    )
    return label_and_soft(step, student.label_BC, loss, alpha=settings.alpha)


class Hard(HeadSettings):
    """(1 - alpha) label loss + alpha / n sum_i CE(head_i / T, the class teacher_i predicts)."""

    name: Literal["hard"] = "hard"
    temperature: Temperature = 1.0
    alpha: Fraction = 0.5


def hard(settings: Hard, step: Step) -> dict[str, Tensor]:
    """`(1 - alpha) CE(z, y) + alpha / n sum_i CE(z_i / T, argmax v_i)` over all of `caches`.

    Heads as in `soft`. A teacher predicts one class for a mixed view.

    Source: Touvron et al., "Training data-efficient image transformers", ICML 2021, with n
    teachers; T = 1 and alpha 0.5 there.
    """
    student = logits_of_heads(step.student, step.images_B3HW)
    loss = multi_teacher_hard_loss(
        student.teachers, _every_teacher(step), temperature=settings.temperature
    )
    return {
        "label": (1 - settings.alpha) * label_term(step, student.label_BC),
        "hard": settings.alpha * loss,
    }


class Ensemble(StandardizeSettings):
    """(1 - alpha) label loss + alpha T**2 KL(average of the teachers || student) at T."""

    name: Literal["ensemble"] = "ensemble"
    temperature: Temperature = 4.0
    alpha: Fraction = 0.9
    mean: Annotated[
        EnsembleMean,
        Field(description="arithmetic: of probabilities at T; geometric: of logits."),
    ] = "arithmetic"


def ensemble(settings: Ensemble, step: Step) -> dict[str, Tensor]:
    """`(1 - alpha) CE + alpha T**2 KL(mean_i p(v_i; T) || p(z; T))` over all of `caches`.

    Where teachers disagree the target is one distribution between theirs, while `soft` has all of
    theirs at once: under the arithmetic mean the gradients are equal, the values are not.
    `standardize` z-scores the student's logits and each member's first, so that no member
    dominates the mean by the size of its logits.

    Source: Hinton et al. 2015, section 1, which allows for both means; T and alpha as in `kd`.
    """
    logits_BC = step.student(step.images_B3HW)
    (student_BC,) = settings.standardized(logits_BC)
    teacher_BC = ensemble_logits(
        settings.standardized(*_every_teacher(step, temperature=settings.temperature)),
        temperature=settings.temperature,
        mean=settings.mean,
    )
    loss = kd_loss(student_BC, teacher_BC, temperature=settings.temperature)
    return label_and_soft(step, logits_BC, loss, alpha=settings.alpha)


def _every_teacher(step: Step, *, temperature: float = 1.0) -> list[Tensor]:
    """Whole-image logits [B, C] of all teachers, in the order of `caches`."""
    return [
        step.teacher_logits(temperature=temperature, cache=index)[:, 0]
        for index in range(len(step.teachers))
    ]


def logits_of_heads(student: nn.Module, images_B3HW: Tensor) -> HeadLogits:
    """A student's logits; its only head serves labels and all teachers if it has no others."""
    if isinstance(student, HeadedStudent):
        return student.forward_heads(images_B3HW)
    logits_BC = student(images_B3HW)
    return HeadLogits(logits_BC, (logits_BC,))


def _needs_heads(settings: HeadSettings, facts: RunFacts) -> None:
    """A check: a student with one head for all teachers or one for each of them."""
    num_teachers = len(facts.teachers)
    if not isinstance(facts.student, HeadedStudent):
        if settings.heads == "each":
            raise ConfigError(
                f"method.heads=each requires a head for each of {num_teachers} teachers, but the "
                f"student {type(facts.student).__name__} has no heads for teachers.",
                hint=f"Train `student: {{model: distill.tokens:vit_tokens, model_args: "
                f"{{backbone: vit_tiny_patch16_224, num_tokens: {num_teachers}}}}}`.",
            )
        return
    num_heads = facts.student.num_teacher_heads
    allowed = {"any": {1, num_teachers}, "shared": {1}, "each": {num_teachers}}[settings.heads]
    if num_heads not in allowed:
        numbers = " or ".join(str(number) for number in sorted(allowed))
        heads = "head" if max(allowed) == 1 else "heads"
        raise ConfigError(
            f"method {settings.name} with heads={settings.heads} learns from {num_teachers} "
            f"{'teacher' if num_teachers == 1 else 'teachers'} by {numbers} {heads} of the "
            f"student, which has {num_heads}.",
            hint=f"Use `--set student.model_args.num_tokens={max(allowed)}`.",
        )


METHODS = (
    Method(Soft, soft, (needs_teachers, _needs_heads, needs_logits_to_standardize)),
    Method(Hard, hard, (needs_teachers, _needs_heads)),
    Method(Ensemble, ensemble, (needs_teachers, needs_logits_to_standardize)),
)
