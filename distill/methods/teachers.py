"""What methods ask of their teachers beyond `needs_one_teacher`."""

from __future__ import annotations

from cache_service.errors import ConfigError, UnsupportedError
from distill.methods.base import MethodSettings, Plan, Step, needs_one_teacher


def depends_on_temperature(step: Step) -> bool:
    """Whether the teacher's logits are other ones at each temperature, because classes dropped."""
    return step.teachers[0].codec == "topk"


def needs_teachers(settings: MethodSettings, plan: Plan) -> None:
    """A check: one teacher or several, each of the student's classes."""
    if not plan.teachers:
        raise ConfigError(
            f"method {settings.name} learns from one teacher or several, but `caches` is empty.",
            hint="Name them under `caches`, or train with `method: {name: ce}`.",
        )
    for teacher in plan.teachers:
        needs_one_teacher(settings, plan._replace(teachers=(teacher,)))


def needs_every_logit(settings: MethodSettings, plan: Plan, *, why: str) -> None:
    """A check: no teacher's cache dropped classes.

    Args:
        settings: of the method.
        plan: of the run.
        why: what the method does with all logits, for the message.
    """
    for teacher in plan.teachers:
        if teacher.codec == "topk":
            raise UnsupportedError(
                f"method {settings.name} {why}, but {teacher.origin} keeps only the largest "
                "(codec topk).",
                hint="Record another cache with `kd-cache build FILE --set codec.kind=int8`.",
            )
