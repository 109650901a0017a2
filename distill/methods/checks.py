"""Checks that several methods make before a run; each refuses what the method cannot train from."""

from __future__ import annotations

from cache_service.errors import ConfigError, UnsupportedError
from distill.methods.method import MethodSettings, RunFacts
from distill.methods.setting_types import StandardizeSettings


def needs_one_teacher(settings: MethodSettings, facts: RunFacts) -> None:
    """Require exactly one teacher, of the student's classes."""
    if not facts.teachers:
        raise ConfigError(
            f"method {settings.name} learns from a teacher, but `caches` is empty.",
            hint="Name a cache under `caches`, or train with `method: {name: ce}`.",
        )
    if len(facts.teachers) > 1:
        origins = ", ".join(teacher.origin for teacher in facts.teachers)
        raise ConfigError(
            f"method {settings.name} learns from one teacher, but `caches` names "
            f"{len(facts.teachers)}: {origins}."
        )
    _needs_the_same_classes(facts)


def needs_teachers(settings: MethodSettings, facts: RunFacts) -> None:
    """Require one teacher or several, each of the student's classes."""
    if not facts.teachers:
        raise ConfigError(
            f"method {settings.name} learns from one teacher or several, but `caches` is empty.",
            hint="Name them under `caches`, or train with `method: {name: ce}`.",
        )
    _needs_the_same_classes(facts)


def _needs_the_same_classes(facts: RunFacts) -> None:
    for teacher in facts.teachers:
        if teacher.num_classes != facts.num_classes:
            raise ConfigError(
                f"{teacher.origin} has logits for {teacher.num_classes} classes, but the student "
                f"has {facts.num_classes}."
            )


def needs_unmixed(settings: MethodSettings, facts: RunFacts, *, why: str) -> None:
    """Require a recipe without mixing. `why` is what the method does, for the message."""
    if facts.mixes:
        raise UnsupportedError(
            f"method {settings.name} {why}, but the recipe mixes samples (mixup or cutmix).",
            hint="Leave mixup and cutmix out of `augment`, and record the cache again.",
        )


def needs_every_logit(settings: MethodSettings, facts: RunFacts, *, why: str) -> None:
    """Require caches that dropped no class. `why` is what the method does, for the message."""
    for teacher in facts.teachers:
        if teacher.drops_classes:
            raise UnsupportedError(
                f"method {settings.name} {why}, but {teacher.origin} keeps only the largest "
                "(codec topk).",
                hint="Record another cache with `kd-cache build FILE --set codec.kind=int8`.",
            )


def needs_logits_to_standardize(settings: StandardizeSettings, facts: RunFacts) -> None:
    """Require every logit where their standard deviation is needed."""
    if settings.standardize:
        why = "with standardize divides by the standard deviation of all logits"
        needs_every_logit(settings, facts, why=why)
