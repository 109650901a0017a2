"""`deit-cifar100`: transformers taught by CNNs, transformers, both, and their own students."""

from __future__ import annotations

from typing import Any

from cli.experiments.reproduce.deit import FULL, KINDS, QUICK, DeitSettings
from cli.experiments.reproduce.deit_runs import (
    CYCLED,
    CYCLED_TEAM,
    ROUNDS,
    TEAMS,
    Score,
    Scores,
    hire,
    run_cycles,
    score_of,
    teach_team,
    title_of,
)
from cli.experiments.reproduce.machine import describe_machine, describe_versions
from cli.experiments.reproduce.order import Order, Reproduction
from cli.experiments.reproduce.school import School, seconds_of
from cli.experiments.reproduce.table import Figure, Goal, Row, Table

NAME = "deit-cifar100"

SOURCE = "A study of DeiT students with several teachers on CIFAR-100, 22 M parameters a student"

PUBLISHED: dict[str, tuple[Figure, Figure]] = {
    "cnn": (13.2, 1.8),
    "vit": (13.7, 2.3),
    "soft, CNN": (14.0, 1.8),
    "hard, CNN": (12.3, 1.7),
    "soft, DeiT": (12.4, 1.6),
    "hard, DeiT": (11.9, 1.7),
    "soft, DeiT + CNN": (12.5, 1.5),
    "hard, DeiT + CNN": (12.4, 1.7),
    "soft, CNN + CNN": (12.7, 1.5),
    "hard, CNN + CNN": (12.3, 1.7),
}
"""Errors by top-1 and by top-5, %, of students with one token for all teachers."""


def reproduce(order: Order, settings: DeitSettings | None = None) -> Table:
    """Train what is not trained yet, and put the figures together.

    Raises:
        DatasetError: CIFAR-100 is not where it should be.
        ConfigError: weights cannot be fetched, or `order.out` holds runs of other settings.
    """
    settings = settings or (QUICK if order.quick else FULL)
    school = School(NAME, settings.images, order)
    school.open()
    staff = hire(school, settings)
    scores: Scores = {
        "cnn": (score_of(staff.teachers["cnn"]),),
        "vit": (score_of(staff.teachers["vit"]),),
    }
    seconds = {"teachers": seconds_of(staff.teachers)}
    seconds["recordings"] = sum(each.seconds for each in staff.recordings.values())
    for team, members in TEAMS.items():
        found, spent = teach_team(school, settings, staff, team, members)
        scores |= found
        seconds[f"students of {team}"] = spent
    found, spent = run_cycles(school, settings, staff)
    scores |= found
    seconds[f"students of {CYCLED}, both cycles"] = spent
    return Table(
        name=NAME,
        title="Transformers with several teachers on CIFAR-100",
        source=f"{SOURCE}.",
        quick=order.quick,
        command=order.command(NAME),
        rows=tuple(row for what, runs in scores.items() for row in _rows(what, runs)),
        goals=_goals(scores),
        notes=NOTES,
        settings=settings.model_dump(mode="json"),
        machine=describe_machine(order.device),
        versions=describe_versions(),
        seconds=seconds,
        unit="error rate",
    )


def _rows(what: str, runs: tuple[Score, ...]) -> tuple[Row, Row]:
    published: Any = PUBLISHED.get(what, (None, None))
    title = {"cnn": "teacher, CNN", "vit": "teacher, DeiT; also the student on labels"}.get(what)
    return (
        Row(
            what=f"{title or what}: top-1",
            published=published[0],
            runs=tuple(run.top1 for run in runs),
        ),
        Row(
            what=f"{title or what}: top-5",
            published=published[1],
            runs=tuple(run.top5 for run in runs),
        ),
    )


NOTES = (
    (
        "Published figures are of one distillation token for all teachers. Rows of several tokens "
        "have one for each teacher."
    ),
    (
        "In the second cycle the better student of the first one, by its test errors, is a third "
        "teacher: that is a choice made on the test set, so it flatters. The study's second cycle "
        "failed, and it blamed the single token."
    ),
)


def _goals(scores: Scores) -> tuple[Goal, ...]:
    means = {what: _rows(what, runs)[0].mean for what, runs in scores.items()}
    last = len(CYCLED_TEAM) + ROUNDS - 1
    wanted = [
        (f"{title_of('hard', 'CNN', 1)}: fewer errors than on labels", "hard, CNN", "vit"),
        (f"{title_of('hard', 'DeiT', 1)}: fewer errors than on labels", "hard, DeiT", "vit"),
    ]
    for kind in KINDS:
        second = title_of(kind, CYCLED, last, ROUNDS)
        first = title_of(kind, CYCLED, len(CYCLED_TEAM))
        wanted.append((f"{second}: no more errors than in cycle 1", second, first))
    return tuple(_goal(text, means[low], means[high]) for text, low, high in wanted)


def _goal(text: str, low: float | None, high: float | None) -> Goal:
    if low is None or high is None:
        return Goal(text=text, measured="a run failed", met=None)
    return Goal(text=text, measured=f"{low:.2f}, against {high:.2f}", met=low <= high)


REPRODUCTION = Reproduction(
    name=NAME,
    summary="CIFAR-100, DeiT students of CNN, DeiT and mixed teachers, one and several tokens.",
    data="data/cifar100",
    seeds=3,
    run=reproduce,
    options=frozenset({"device"}),
)
