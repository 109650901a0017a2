"""`omitted-three`: a student that never saw a 3 learns it from what its teacher says of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cli.reproduce.answers import student_answers
from cli.reproduce.bias import Errors, Labels, Logits, choose_raise, count_errors
from cli.reproduce.classroom import Classroom
from cli.reproduce.hinton import FULL, QUICK, SOURCE, HintonSettings
from cli.reproduce.machine import describe_machine, describe_versions
from cli.reproduce.mnist import mnist_document
from cli.reproduce.order import Order, Reproduction
from cli.reproduce.table import Goal, Measured, Row, Table

NAME = "omitted-three"

OMITTED = 3

PUBLISHED_TEACHER = 67
PUBLISHED_BEFORE = Errors(206, 133)
PUBLISHED_AFTER = Errors(109, 14)
"""Test errors of all 10,000, and of the 1,010 threes, before and after the bias is raised."""

WANTED_RIGHT = 0.98
"""Share of the test threes right once the bias is set."""


class Raised(NamedTuple):
    """One student's errors on the test set.

    Attributes:
        before: as trained.
        by_test: what the bias was raised by for the fewest test errors, as the paper does.
        after: with that.
        by_train: what it was raised by for the fewest errors on the training set, threes included.
        held_out: test errors with that.
        num_threes: of the test set.
    """

    before: Errors
    by_test: float
    after: Errors
    by_train: float
    held_out: Errors
    num_threes: int


Answers = tuple[Logits, Labels]


def raise_bias(test: Answers, train: Answers) -> Raised:
    """Set the bias of the omitted class both ways. Answers are logits and labels."""
    by_test = choose_raise(*test, label=OMITTED)
    by_train = choose_raise(*train, label=OMITTED)
    return Raised(
        before=count_errors(*test, label=OMITTED),
        by_test=by_test,
        after=count_errors(*test, label=OMITTED, raised=by_test),
        by_train=by_train,
        held_out=count_errors(*test, label=OMITTED, raised=by_train),
        num_threes=int((test[1] == OMITTED).sum()),
    )


def reproduce(order: Order, settings: HintonSettings | None = None) -> Table:
    """Train what is not trained yet, set the bias, and put the figures together.

    Raises:
        DatasetError: MNIST is not where it should be.
        ConfigError, SpecMismatchError: `order.out` holds runs of other settings.
    """
    settings = settings or (QUICK if order.quick else FULL)
    room = Classroom(NAME, settings, order, settings.unmoved, omit=(OMITTED,))
    teacher = room.teacher_run()
    recording, soft = room.soft_runs(teacher)
    raised = [_raise_bias(room, run) for run in soft.measured]
    return Table(
        name=NAME,
        title="A digit that the student never saw",
        source=f"{SOURCE}.",
        quick=order.quick,
        command=order.command(NAME),
        rows=_rows(teacher.measured, soft.measured, raised),
        goals=(_goal(raised),),
        notes=_notes(raised),
        settings=settings.model_dump(mode="json"),
        machine=describe_machine(),
        versions=describe_versions(),
        seconds={
            "teacher": teacher.seconds,
            "recording": recording,
            "students": soft.seconds,
        },
    )


def _raise_bias(room: Classroom, run: Measured) -> Raised | None:
    if run.failure is not None:
        return None
    document, data = room.soft_document(run.seed), room.order.data
    test, train = (
        student_answers(document, mnist_document(data, part)) for part in ("test", "train")
    )
    return raise_bias(test, train)


def _rows(
    teacher: tuple[Measured, ...], soft: tuple[Measured, ...], raised: Sequence[Raised | None]
) -> tuple[Row, ...]:
    rows = [
        Row(what="teacher, all digits", published=PUBLISHED_TEACHER, runs=teacher),
        Row(what="student, as trained", published=PUBLISHED_BEFORE.total, runs=soft),
    ]
    derived: list[tuple[str, int | None, list[int | None]]] = [
        (
            "student, as trained: threes wrong",
            PUBLISHED_BEFORE.of_class,
            [each and each.before.of_class for each in raised],
        ),
        ("bias raised", PUBLISHED_AFTER.total, [each and each.after.total for each in raised]),
        (
            "bias raised: threes wrong",
            PUBLISHED_AFTER.of_class,
            [each and each.after.of_class for each in raised],
        ),
        ("bias set on training set", None, [each and each.held_out.total for each in raised]),
        (
            "bias set on training set: threes wrong",
            None,
            [each and each.held_out.of_class for each in raised],
        ),
    ]
    for what, published, figures in derived:
        runs = (
            Measured(seed=run.seed, last=figure, failure=run.failure and "no student")
            for run, figure in zip(soft, figures, strict=True)
        )
        rows.append(Row(what=what, published=published, runs=tuple(runs)))
    return tuple(rows)


def _goal(raised: Sequence[Raised | None]) -> Goal:
    text = f"at least {WANTED_RIGHT:.0%} of the test threes right, mean over seeds"
    known = [each for each in raised if each is not None]
    if len(known) < len(raised):
        return Goal(text=text, measured="a run failed", met=None)
    right = sum(1 - each.after.of_class / each.num_threes for each in known) / len(known)
    return Goal(text=text, measured=f"{right:.2%}", met=right >= WANTED_RIGHT)


def _notes(raised: Sequence[Raised | None]) -> tuple[str, ...]:
    known = [each for each in raised if each is not None]
    by_test = ", ".join(f"{each.by_test:.2f}" for each in known) or "nothing"
    by_train = ", ".join(f"{each.by_train:.2f}" for each in known) or "nothing"
    return (
        (
            "No 3 is in the transfer set, neither in the cache nor among the labels that the "
            "student sees; the teacher was trained on all digits."
        ),
        (
            "Bias raised: by what makes the fewest errors on the test set itself, as in the paper "
            f"(by {by_test}). That is a choice made on the test set, so it flatters."
        ),
        (
            "Bias set on training set: the same choice made on all training images, of which the "
            f"student never saw the 3s (by {by_train}); the test set has no part in it."
        ),
    )


REPRODUCTION = Reproduction(
    name=NAME,
    summary="MNIST without 3s: share of test threes right once their bias is raised: 98.6 %.",
    data="data/mnist",
    seeds=3,
    run=reproduce,
)
