"""The runs of the table of CNN and DeiT teachers: teachers, teams of them, and two cycles."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

from cache_service.configfile import validate_config
from cache_service.errors import NonFiniteError, UntrainedTeacherError
from cli.experiments.cycle.config import CycleConfig
from cli.experiments.cycle.run import read_cycle, run_cycle
from cli.experiments.cycle.table import CycleTable, StudentScore
from cli.experiments.reproduce.cohort import Outcome, cohort_seconds
from cli.experiments.reproduce.deit import KINDS, DeitSettings, Kind
from cli.experiments.reproduce.order import Order
from cli.experiments.reproduce.school import (
    Document,
    Recording,
    School,
    error_rate,
    seconds_of,
    top5_error_rate,
)
from cli.experiments.reproduce.table import Measured

TEAMS: dict[str, tuple[str, ...]] = {
    "CNN": ("cnn",),
    "DeiT": ("vit",),
    "CNN + CNN": ("cnn", "cnn-2"),
}
"""Teachers of the students of one cycle."""

CYCLED, CYCLED_TEAM = "DeiT + CNN", ("vit", "cnn")
"""Those of two cycles: the better student of the first one is a teacher of the second."""

ROUNDS = 2


class Score(NamedTuple):
    """Both figures of one run."""

    top1: Measured
    top5: Measured


Scores = dict[str, tuple[Score, ...]]
"""Runs, one per seed, by what they are."""


class Staff(NamedTuple):
    """Trained teachers and what they said."""

    teachers: Mapping[str, Outcome]
    recordings: Mapping[str, Recording]

    def problem(self, team: tuple[str, ...]) -> str | None:
        """Why these cannot teach."""
        problems = (self.recordings[name].problem for name in team)
        return next((problem for problem in problems if problem is not None), None)

    def caches(self, team: tuple[str, ...]) -> list[str]:
        """Of teachers without a problem."""
        return [cache for name in team if (cache := self.recordings[name].cache) is not None]


def hire(school: School, settings: DeitSettings) -> Staff:
    """Train and record the teachers."""
    plans = {
        "cnn": (settings.cnn, settings.cnn_training, 0),
        "cnn-2": (settings.cnn, settings.cnn_training, 1),
        "vit": (settings.vit, settings.vit_training, 0),
    }
    recording = {"codec": settings.codec.model_dump(mode="json")}
    teachers, recordings = {}, {}
    for name, (net, training, seed) in plans.items():
        teachers[name] = school.teach(net, training, name=name, seed=seed)
        recordings[name] = school.record(
            teachers[name], name=name, recorded=settings.recorded, recording=recording
        )
    return Staff(teachers, recordings)


def teach_team(
    school: School, settings: DeitSettings, staff: Staff, team: str, members: tuple[str, ...]
) -> tuple[Scores, float]:
    """The students of a team, of soft and of hard answers, and the seconds of their epochs."""
    seeds = range(school.order.seeds)
    tokens = sorted({1, len(members)})
    titles = {(kind, count): title_of(kind, team, count) for kind in KINDS for count in tokens}
    problem = staff.problem(members)
    if problem is not None:
        return {title: _failed(problem, school.order) for title in titles.values()}, 0.0
    own = {
        f"{kind}-{count}-{seed}": {
            "student": settings.student(count),
            "method": settings.method(kind),
            "seed": seed,
        }
        for kind, count in titles
        for seed in seeds
    }
    learns: Document = {"caches": staff.caches(members), "seeds": f"0:{settings.recorded}"}
    folder = "-".join(members)
    outcomes = school.train(own, settings.vit_training, folder=folder, learns=learns)
    scores = {
        title: tuple(score_of(outcomes[f"{kind}-{count}-{seed}"]) for seed in seeds)
        for (kind, count), title in titles.items()
    }
    return scores, seconds_of(outcomes)


def run_cycles(school: School, settings: DeitSettings, staff: Staff) -> tuple[Scores, float]:
    """Students of both cycles, with one token for all teachers and with one for each."""
    scores: dict[str, list[Score]] = {}
    outs: list[str] = []
    for each in (False, True):
        for seed in range(school.order.seeds):
            table, problem = _one_cycle(school, settings, staff, seed=seed, each=each)
            students = {
                (one.round, who.method): who for one in table.rounds for who in one.students
            }
            outs += [who.out for who in students.values()]
            for number, kind in product(range(1, ROUNDS + 1), KINDS):
                tokens = len(CYCLED_TEAM) + number - 1 if each else 1
                who = students.get((number, kind)) or StudentScore(
                    method=kind, out="", failure=problem or "nothing was trained"
                )
                score = _cycle_score(who, seed, settings.vit_training.epochs)
                scores.setdefault(title_of(kind, CYCLED, tokens, number), []).append(score)
    return {title: tuple(runs) for title, runs in scores.items()}, cohort_seconds(outs)


def _one_cycle(
    school: School, settings: DeitSettings, staff: Staff, *, seed: int, each: bool
) -> tuple[CycleTable, str | None]:
    """What came of its rounds, and what stopped it."""
    where = f"{school.name} cycle"
    problem = staff.problem(CYCLED_TEAM)
    if problem is not None:
        return CycleTable(out="", rounds=()), problem
    document = _cycle_document(school, settings, staff, seed=seed, each=each)
    config = validate_config(CycleConfig, document, where=where)
    try:
        return run_cycle(config, where=where, say=school.order.say, resident=True), None
    except (UntrainedTeacherError, NonFiniteError) as failure:
        return read_cycle(config.out), failure.message


def _cycle_document(
    school: School, settings: DeitSettings, staff: Staff, *, seed: int, each: bool
) -> Document:
    order, images = school.order, settings.images
    tokens = "each" if each else "one"
    return {
        "out": order.folder(school.name, f"cycle-{tokens}-{seed}"),
        "rounds": ROUNDS,
        "teachers": staff.caches(CYCLED_TEAM),
        "tokens": each,
        "methods": [settings.method(kind) for kind in KINDS],
        "build": {
            "dataset": school.dataset("train"),
            "augment": images.augment(),
            "seeds": f"0:{settings.recorded}",
            "codec": settings.codec.model_dump(mode="json"),
            "batch_size": 500,
            "workers": images.workers,
            "device": order.device,
        },
        "train": {
            **settings.vit_training.document(),
            "student": settings.student(1),
            "seed": seed,
            "device": order.device,
            "workers": images.workers,
            "evaluate": {"dataset": school.dataset("test"), "batch_size": 500},
        },
    }


def title_of(kind: Kind, team: str, tokens: int, number: int = 1) -> str:
    """Of one token the study's title alone, so that its figures are found."""
    title = f"{kind}, {team}"
    if number > 1:
        title += f", cycle {number}"
    return title if tokens == 1 else f"{title}, {tokens} tokens"


def score_of(outcome: Outcome) -> Score:
    """Both figures of a run."""
    return Score(outcome.measured(error_rate), outcome.measured(top5_error_rate, best=False))


def _cycle_score(student: StudentScore, seed: int, epochs: int) -> Score:
    if student.top1 is None or student.top5 is None or student.best_top1 is None:
        failed = Measured(seed=seed, failure=student.failure or "nothing was scored")
        return Score(failed, failed)
    top1 = Measured(
        seed=seed,
        last=round(100 - 100 * student.top1, 4),
        best=round(100 - 100 * student.best_top1, 4),
        best_epoch=student.best_epoch,
        epochs=epochs,
    )
    return Score(top1, Measured(seed=seed, last=round(100 - 100 * student.top5, 4), epochs=epochs))


def _failed(problem: str, order: Order) -> tuple[Score, ...]:
    runs = (Measured(seed=seed, failure=problem) for seed in range(order.seeds))
    return tuple(Score(run, run) for run in runs)
