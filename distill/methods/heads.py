"""Students that learn from teachers by heads of their own, and those that have the usual one.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor, nn

from cache_service.errors import ConfigError
from distill.methods.method import MethodSettings, RunFacts, needs_teachers


class HeadLogits(NamedTuple):
    """A student's answers, head by head, each [B, C].

    Attributes:
        label_BC: of the head that learns from labels.
        teachers: of the heads that learn from teachers: one for all of them, or one for each.
    """

    label_BC: Tensor
    teachers: tuple[Tensor, ...]


@runtime_checkable
class HeadedStudent(Protocol):
    """A network with heads for teachers beside the one for labels.

    Its plain forward answers [B, C] logits as any other's, in every mode: the average of all of
    its heads. `distill.tokens` makes vision transformers of this kind.
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
            description="Refuse a student that has not one head for all teachers (shared), or one "
            "for each of them (each)."
        ),
    ] = "any"


def answer_heads(student: nn.Module, images_B3HW: Tensor) -> HeadLogits:
    """A student's answers; one without heads for teachers answers all of them with its only one."""
    if isinstance(student, HeadedStudent):
        return student.forward_heads(images_B3HW)
    logits_BC = student(images_B3HW)
    return HeadLogits(logits_BC, (logits_BC,))


def needs_heads(settings: HeadSettings, facts: RunFacts) -> None:
    """A check: teachers, and a student with one head for all or one for each of them."""
    needs_teachers(settings, facts)
    wanted = len(facts.teachers)
    if not isinstance(facts.student, HeadedStudent):
        if settings.heads == "each":
            raise ConfigError(
                f"method.heads=each asks for a head for each of {wanted} teachers, but the student "
                f"{type(facts.student).__name__} has no heads for teachers.",
                hint=f"Train `student: {{model: distill.tokens:vit_tokens, model_args: "
                f"{{backbone: vit_tiny_patch16_224, num_tokens: {wanted}}}}}`.",
            )
        return
    found = facts.student.num_teacher_heads
    allowed = {"any": {1, wanted}, "shared": {1}, "each": {wanted}}[settings.heads]
    if found not in allowed:
        numbers = " or ".join(str(number) for number in sorted(allowed))
        heads = "head" if max(allowed) == 1 else "heads"
        raise ConfigError(
            f"method {settings.name} with heads={settings.heads} learns from {wanted} "
            f"{'teacher' if wanted == 1 else 'teachers'} by {numbers} {heads} of the student, "
            f"which has {found}.",
            hint=f"Use `--set student.model_args.num_tokens={max(allowed)}`.",
        )
