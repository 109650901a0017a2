"""`deit-cifar100`: transformers taught by CNNs, transformers, both, and their own students.

The students of one or two teachers are the shipped experiment. Beyond it, DeiT and CNN together
teach in two rounds of a cycle, whose second round has the better student of the first as a third
teacher; and every figure stands beside its top-5 error rate.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

from cache_service.config import validate_config
from cache_service.errors import NonFiniteError, UntrainedTeacherError
from cli.experiments.cycle import CycleConfig, CycleTable, StudentScore, read_cycle, run_cycle
from cli.experiments.experiment_file import Document, Figure
from cli.experiments.reproduce.shipped import Made, Options, shipped_document, shipped_experiment
from cli.experiments.result_table import Goal, Measured, Row
from cli.experiments.runner import (
    ExperimentResult,
    Outcome,
    epoch_seconds,
    error_rate,
    run_experiment,
)
from distill.scores import Evaluation

KINDS = ("soft", "hard")
CYCLED = ("vit", "cnn")
CYCLED_TITLE = "DeiT + CNN"
ROUNDS = 2

PUBLISHED_TOP5: dict[str, Figure] = {
    "teacher, CNN": 1.8,
    "teacher, DeiT; also the student on labels": 2.3,
    "soft, CNN": 1.8,
    "hard, CNN": 1.7,
    "soft, DeiT": 1.6,
    "hard, DeiT": 1.7,
    "soft, DeiT + CNN": 1.5,
    "hard, DeiT + CNN": 1.7,
    "soft, CNN + CNN": 1.5,
    "hard, CNN + CNN": 1.7,
}
PUBLISHED_CYCLED: dict[str, Figure] = {"soft, DeiT + CNN": 12.5, "hard, DeiT + CNN": 12.4}
"""Error rates, %, of students with one token for all teachers, which the file does not name."""


class Score(NamedTuple):
    """Both error rates of one run."""

    top1: Measured
    top5: Measured


def make_deit_cifar100(options: Options, root: str) -> Made:
    """The table of all students."""
    document = shipped_document(options, root=root)
    result = run_experiment(
        shipped_experiment(document, options), where=options.name, on_message=options.on_message
    )
    cycles, outs = _run_cycles(result, document, options)
    goals = [*result.goals()]
    means = {title: _rows(title, None, scores)[0].mean for title, scores in cycles.items()}
    last = len(CYCLED) + ROUNDS - 1
    for kind in KINDS:
        second, first = _title(kind, last, ROUNDS), _title(kind, len(CYCLED))
        text = f"{second}: no more errors than in cycle 1"
        goals.append(_no_worse(text, means[second], means[first]))
    table = result.table(
        name=options.name,
        command=options.command,
        quick=options.quick,
        rows=(*_experiment_rows(result), *_cycle_rows(cycles)),
        goals=tuple(goals),
    )
    seconds = table.seconds | {f"students of {CYCLED_TITLE}, both cycles": epoch_seconds(outs)}
    return Made(table.model_copy(update={"seconds": seconds}), result.curves())


def _top5_error_rate(evaluation: Evaluation) -> float:
    return round(100 - 100 * evaluation.top5, 4)


def _score(outcome: Outcome) -> Score:
    return Score(outcome.measured(error_rate), outcome.measured(_top5_error_rate, best=False))


def _rows(title: str, published: object, scores: list[Score]) -> tuple[Row, Row]:
    top5 = PUBLISHED_TOP5.get(title)
    return (
        Row.model_validate(
            {
                "what": f"{title}: top-1",
                "published": published,
                "runs": tuple(score.top1 for score in scores),
            }
        ),
        Row(
            what=f"{title}: top-5",
            published=top5,
            runs=tuple(score.top5 for score in scores),
        ),
    )


def _experiment_rows(result: ExperimentResult) -> tuple[Row, ...]:
    names = [*(name for name in result.teachers if name != "cnn-2"), *result.runs]
    rows: list[Row] = []
    for name in names:
        outcomes = result.runs.get(name) or (result.teachers[name],)
        published = result.config.published.get(name)
        rows += _rows(result.config.title_of(name), published, [_score(each) for each in outcomes])
    return tuple(rows)


def _cycle_rows(cycles: dict[str, list[Score]]) -> tuple[Row, ...]:
    rows: list[Row] = []
    for title, scores in cycles.items():
        rows += _rows(title, PUBLISHED_CYCLED.get(title), scores)
    return tuple(rows)


def _run_cycles(
    result: ExperimentResult, document: Document, options: Options
) -> tuple[dict[str, list[Score]], list[str]]:
    """Students of both cycles, with one token for all teachers and with one for each.

    Returns their scores by title, one a seed, and the folders of their runs.
    """
    scores: dict[str, list[Score]] = {}
    outs: list[str] = []
    for has_token_each, seed in product((False, True), range(options.runs)):
        cycle = cycle_document(result, document, seed=seed, has_token_each=has_token_each)
        table, problem = _run_cycle(result, cycle, options)
        students = {
            (round_.round, student.method): student
            for round_ in table.rounds
            for student in round_.students
        }
        outs += [student.out for student in students.values()]
        for number, kind in product(range(1, ROUNDS + 1), KINDS):
            tokens = len(CYCLED) + number - 1 if has_token_each else 1
            student = students.get((number, kind)) or StudentScore(
                method=kind, out="", failure=problem or "nothing was trained"
            )
            score = _cycle_score(student, seed, cycle["train"]["epochs"])
            scores.setdefault(_title(kind, tokens, number), []).append(score)
    return scores, outs


def _run_cycle(
    result: ExperimentResult, document: Document, options: Options
) -> tuple[CycleTable, str | None]:
    """The rounds of a cycle that were trained, and what stopped it."""
    problems = (result.recordings[name].problem for name in CYCLED)
    problem = next((each for each in problems if each is not None), None)
    if problem is not None:
        return CycleTable(out="", rounds=()), problem
    where = f"{options.name} cycle"
    config = validate_config(CycleConfig, document, where=where)
    try:
        return run_cycle(config, where=where, on_message=options.on_message), None
    except (UntrainedTeacherError, NonFiniteError) as failure:
        return read_cycle(config.out), failure.message


def cycle_document(
    result: ExperimentResult, document: Document, *, seed: int, has_token_each: bool
) -> Document:
    """The cycle file of one seed: the experiment's data, recordings, student and methods."""
    methods = {name: entry["method"] for name, entry in document["methods"].items()}
    recording = document["recordings"]["vit"]
    tokens = "each" if has_token_each else "one"
    return {
        "out": str(Path(document["out"], f"cycle-{tokens}-{seed}")),
        "rounds": ROUNDS,
        "teachers": [result.config.cache_of(name) for name in CYCLED],
        "tokens": has_token_each,
        "methods": [methods["soft-cnn"], methods["hard-cnn"]],
        "build": {
            "dataset": document["dataset"],
            "augment": document["augment"],
            **{key: value for key, value in recording.items() if key != "teacher"},
        },
        "train": {
            **document["train"],
            "student": document["students"]["one-token"],
            "seed": seed,
            "evaluate": document["evaluate"],
        },
    }


def _title(kind: str, tokens: int, number: int = 1) -> str:
    """The title of a row. With one token it is the study's own, so that its figures are found."""
    title = f"{kind}, {CYCLED_TITLE}"
    if number > 1:
        title += f", cycle {number}"
    return title if tokens == 1 else f"{title}, {tokens} tokens"


def _cycle_score(student: StudentScore, seed: int, epochs: int) -> Score:
    if student.top1 is None or student.top5 is None or student.best_top1 is None:
        failed = Measured(seed=seed, failure=student.failure or "the run was not evaluated")
        return Score(failed, failed)
    top1 = Measured(
        seed=seed,
        last=round(100 - 100 * student.top1, 4),
        best=round(100 - 100 * student.best_top1, 4),
        best_epoch=student.best_epoch,
        epochs=epochs,
    )
    return Score(top1, Measured(seed=seed, last=round(100 - 100 * student.top5, 4), epochs=epochs))


def _no_worse(text: str, error: float | None, reference: float | None) -> Goal:
    if error is None or reference is None:
        return Goal(text=text, measured="a run failed", met=None)
    return Goal(text=text, measured=f"{error:.2f}, against {reference:.2f}", met=error <= reference)
