"""`sdd-cifar100`: one teacher, and its students by KD, DKD, NKD and their scale decoupled forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cli.experiments.reproduce.machine import describe_machine, describe_versions
from cli.experiments.reproduce.order import Order, Reproduction
from cli.experiments.reproduce.school import School
from cli.experiments.reproduce.sdd import FORMS, FULL, METHODS, QUICK, SddSettings
from cli.experiments.reproduce.sdd_lessons import Lesson, fit_cells, teach_pair, title_of
from cli.experiments.reproduce.sdd_pairs import QUICK as QUICK_PAIR
from cli.experiments.reproduce.sdd_pairs import SOURCE, USUAL, Pair, find_pair
from cli.experiments.reproduce.table import Goal, Row, Table

NAME = "sdd-cifar100"

WANTED_NEAR = 0.7
"""Points by which runs of the published code differ from its own table."""


def reproduce(order: Order, settings: SddSettings | None = None) -> Table:
    """Train what is not trained yet, and put the figures together.

    Raises:
        ConfigError: no such pair, or `order.out` holds runs of other settings.
        DatasetError: CIFAR-100 is not where it should be.
    """
    settings = settings or (QUICK if order.quick else FULL)
    pairs = [fit_cells(pair, settings.images.size) for pair in _choose_pairs(order)]
    school = School(NAME, settings.images, order)
    school.open()
    lessons = [teach_pair(school, settings, pair) for pair in pairs]
    return Table(
        name=NAME,
        title="Scale decoupled distillation on CIFAR-100",
        source=f"{SOURCE}.",
        quick=order.quick,
        command=order.command(NAME),
        rows=tuple(row for lesson in lessons for row in lesson.rows()),
        goals=tuple(goal for lesson in lessons for goal in _goals(lesson)),
        notes=_notes(settings, lessons),
        settings=settings.model_dump(mode="json") | {"pairs": [pair.title for pair in pairs]},
        machine=describe_machine(order.device),
        versions=describe_versions(),
        seconds={name: spent for lesson in lessons for name, spent in lesson.seconds().items()},
        unit="accuracy",
    )


def _choose_pairs(order: Order) -> tuple[Pair, ...]:
    if order.quick and not order.pairs:
        return (QUICK_PAIR,)
    pairs = {pair.title: pair for pair in map(find_pair, order.pairs or USUAL)}
    return tuple(pairs.values())


def _goals(lesson: Lesson) -> tuple[Goal, ...]:
    rows = {method: lesson.row(method) for method in METHODS}
    means = {method: row.mean for method, row in rows.items()}
    goals = [_above(lesson, means, "ce", [name for name in METHODS if name != "ce"])]
    goals += [_above(lesson, means, base, [form]) for base, form in FORMS.items()]
    if lesson.pair.published:
        goals.append(_near(lesson, rows))
    return tuple(goals)


def _above(
    lesson: Lesson, means: Mapping[str, float | None], lower: str, upper: Sequence[str]
) -> Goal:
    titles = "every method" if len(upper) > 1 else title_of(upper[0])
    text = f"{lesson.pair.title}: {titles} above {title_of(lower)}"
    known = {name: mean for name in (lower, *upper) if (mean := means[name]) is not None}
    if len(known) <= len(upper):
        return Goal(text=text, measured="a run failed", met=None)
    least = min(upper, key=lambda name: known[name])
    measured = f"{title_of(least)} {known[least]:.2f}, {title_of(lower)} {known[lower]:.2f}"
    return Goal(text=text, measured=measured, met=known[least] > known[lower])


def _near(lesson: Lesson, rows: Mapping[str, Row]) -> Goal:
    text = f"{lesson.pair.title}: best epochs at most {WANTED_NEAR} below the published figures"
    short = []
    for method, row in rows.items():
        best = [run.best for run in row.runs if run.best is not None]
        if row.published is None:
            continue
        if not best or row.failures:
            return Goal(text=text, measured="a run failed", met=None)
        low = row.published[0] if isinstance(row.published, tuple) else row.published
        gap = low - sum(best) / len(best)
        if gap > WANTED_NEAR:
            short.append(f"{title_of(method)} by {gap:.2f}")
    return Goal(text=text, measured=f"below: {', '.join(short) or 'none'}", met=not short)


def _notes(settings: SddSettings, lessons: Sequence[Lesson]) -> tuple[str, ...]:
    sizes = {
        history.last.num_samples
        for lesson in lessons
        if (history := lesson.teacher.history) is not None and history.last is not None
    }
    known = [f"{50 / size**0.5:.1f} points with {size:,} test images" for size in sorted(sizes)]
    return (
        (
            "Published figures are of the best test epoch. Goals on the order of methods compare "
            "means of the last epoch. The test set is a sample too: near 50 % one figure has a "
            f"standard error of {' and '.join(known) or 'nothing measured'}."
        ),
        (
            "The teacher is this project's, trained on labels. All students of a pair learn on one "
            f"stream of {settings.recorded} recorded epochs, so they see the same views in the "
            "same order; seeds are of their initial weights. The student on labels is among them."
        ),
        (
            "NKD and SD-NKD keep the label in the soft term, as the code that made the published "
            "figures does."
        ),
    )


REPRODUCTION = Reproduction(
    name=NAME,
    summary="CIFAR-100, KD, DKD, NKD and their scale decoupled forms, pair by pair.",
    data="data/cifar100",
    seeds=3,
    run=reproduce,
    options=frozenset({"pair", "device"}),
)
