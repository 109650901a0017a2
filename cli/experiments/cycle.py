"""Learning cycles: a student is recorded and becomes a teacher of the next student.

A cycle file is a build file and a train file without what changes from round to round. Each round
trains one student by every method on one stream; the one with the highest top-1 accuracy is
recorded and teaches in the next rounds. Every part resumes, so the whole does. The table holds no
clock: a cycle that was killed and resumed ends with the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from cache_service.config import EXPANDED, Frozen, load_yaml_config, validate_config
from cache_service.errors import NonFiniteError
from cache_service.recording.build_config import BuildConfig
from cache_service.storage.local import LocalStorage
from cli.experiments.experiment_check import PlannedTeacher, check_students
from cli.experiments.experiment_file import TEACHER_KEYS, Document
from cli.experiments.result_table import grid
from cli.experiments.runner import OnMessage, Outcome, record, train_runs
from distill.config import TrainConfig
from distill.export import STUDENT_NAME

PAGE_NAME = "cycle.md"
JSON_NAME = "cycle.json"

SET_BY_CYCLE = {
    "build": ("cache", "teacher"),
    "train": ("dataset", "caches", "augment", "seeds", "method", "out", "students"),
}
"""Keys of a build and of a train file that a cycle works out for every round."""


class CycleConfig(Frozen):
    """A cycle file."""

    out: Annotated[str, Field(min_length=1, description="Folder of everything written."), EXPANDED]
    rounds: Annotated[int, Field(ge=1, le=100, description="Students, one after the other.")]
    teachers: Annotated[
        tuple[Annotated[str | Document, EXPANDED], ...],
        Field(
            min_length=1,
            description="Of the first round: recorded caches, or a build file's `teacher:`.",
        ),
    ]
    build: Annotated[
        Document, Field(description="A build file without cache and teacher: how to record.")
    ]
    train: Annotated[
        Document,
        Field(description="A train file without dataset, caches and method: how to train."),
    ]
    methods: Annotated[
        tuple[Document, ...],
        Field(
            min_length=1,
            description="`method:` of a train file; of several, the best student goes on.",
        ),
    ]
    keep: Annotated[
        Literal["all"] | Annotated[int, Field(ge=1)],
        Field(description="Teachers of a round: all so far, or the newest ones."),
    ] = "all"
    tokens: Annotated[
        bool, Field(description="Give the student one distillation token for each teacher.")
    ] = False

    @field_validator("build", "train")
    @classmethod
    def _check_part(cls, part: Document, info: Any) -> Document:
        taken = sorted(part.keys() & set(SET_BY_CYCLE[info.field_name]))
        if taken:
            raise ValueError(f"{taken[0]} is set by the cycle, anew for every round")
        if info.field_name == "train" and not part.get("evaluate"):
            raise ValueError("evaluate is missing: rounds are compared, and students chosen, by it")
        return part


def load_cycle(path: str | Path, overrides: Sequence[str] = ()) -> CycleConfig:
    """The cycle file at `path`, with `a.b=value` overrides applied.

    Raises:
        ConfigError: one line that names the file and each bad key.
    """
    return load_yaml_config(CycleConfig, path, overrides)


class StudentScore(Frozen):
    """One student of a round.

    Attributes:
        method: its name in the cycle.
        out: folder of its run.
        top1, top5: accuracy on the evaluation set, after the last epoch.
        best_top1, best_epoch: of its best epoch; chosen on the evaluation set, so it flatters.
        chosen: it teaches in the next round.
        failure: what stopped it.
    """

    method: str
    out: str
    top1: float | None = None
    top5: float | None = None
    best_top1: float | None = None
    best_epoch: int | None = None
    chosen: bool = False
    failure: str | None = None


class RoundScore(Frozen):
    """One round: its teachers, and how good the students became."""

    round: int
    teachers: tuple[str, ...]
    students: tuple[StudentScore, ...]

    @property
    def chosen(self) -> StudentScore | None:
        """The student that teaches in the next round."""
        return next((student for student in self.students if student.chosen), None)


class CycleTable(Frozen):
    """All rounds so far."""

    out: str
    rounds: tuple[RoundScore, ...]

    def page(self) -> str:
        """The table as Markdown."""
        header = ("round", "teachers", "", "method", "top-1", "top-5", "best top-1", "goes on")
        rows = [_row(each, student) for each in self.rounds for student in each.students]
        lines = ["# Learning cycle", "", *grid(header, rows), ""]
        if any(len(each.students) > 1 for each in self.rounds):
            lines += ["The student that goes on is chosen on the evaluation set: it flatters.", ""]
        return "\n".join(lines)


def _row(each: RoundScore, student: StudentScore) -> tuple[str, ...]:
    teachers = (str(each.round), str(len(each.teachers)), ", ".join(each.teachers), student.method)
    if student.failure is not None:
        return (*teachers, f"failed: {student.failure}", "", "", "")
    best = f"{_percent(student.best_top1)} at epoch {student.best_epoch}"
    scores = (_percent(student.top1), _percent(student.top5), best)
    return (*teachers, *scores, "yes" if student.chosen else "")


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.2%}"


class Round(NamedTuple):
    """One round before it is run.

    Attributes:
        number: from 1.
        teachers: of the round.
        students: train files by method.
    """

    number: int
    teachers: tuple[PlannedTeacher, ...]
    students: dict[str, TrainConfig]


class CyclePlan(NamedTuple):
    """A whole cycle as build and train files, worked out from its file alone."""

    config: CycleConfig
    where: str

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each method: its own, numbered where several have the same."""
        names = [str(method.get("name", "?")) for method in self.config.methods]
        totals, counts = Counter(names), Counter[str]()
        labels = []
        for name in names:
            counts[name] += 1
            labels.append(name if totals[name] == 1 else f"{name}-{counts[name]}")
        return tuple(labels)

    def first_teachers(self) -> tuple[PlannedTeacher, ...]:
        """The teachers of the first round.

        Raises:
            ConfigError: a build file is not valid.
        """
        return tuple(
            PlannedTeacher(teacher, teacher, None)
            if isinstance(teacher, str)
            else self._recorded(f"teacher-{number}", str(teacher.get("model", "?")), teacher)
            for number, teacher in enumerate(self.config.teachers, 1)
        )

    def make_round(self, number: int, teachers: tuple[PlannedTeacher, ...]) -> Round:
        """A round with the newest of all `teachers` so far, as the file's `keep` says.

        Raises:
            ConfigError: a train file is not valid.
        """
        keep = self.config.keep
        newest = teachers if keep == "all" else teachers[-keep:]
        students = {
            label: self._student(number, label, method, newest)
            for label, method in zip(self.labels, self.config.methods, strict=True)
        }
        return Round(number, newest, students)

    def next_teacher(self, number: int, label: str) -> PlannedTeacher:
        """The student of a round, by one of its methods, as a teacher."""
        student = dict(self.config.train["student"])
        if self.config.tokens:
            # The number of its own tokens, not that of the next student's.
            known = len(self.config.teachers) + number - 1
            count = known if self.config.keep == "all" else min(known, self.config.keep)
            student = _with_tokens(student, count)
        teacher = {key: student[key] for key in TEACHER_KEYS[:2] if key in student}
        teacher["checkpoint"] = str(Path(self._out(f"round-{number}", label), STUDENT_NAME))
        return self._recorded(f"round-{number}", f"student {number}", teacher)

    def _recorded(self, folder: str, name: str, teacher: Document) -> PlannedTeacher:
        cache = self._out(folder, "cache")
        document = {**self.config.build, "cache": cache, "teacher": teacher}
        build = validate_config(BuildConfig, document, where=f"{self.where}: build")
        return PlannedTeacher(name, cache, build)

    def _student(
        self, number: int, label: str, method: Document, teachers: tuple[PlannedTeacher, ...]
    ) -> TrainConfig:
        document = {
            **self.config.train,
            "dataset": self.config.build.get("dataset"),
            "caches": [teacher.cache for teacher in teachers],
            "seeds": self.config.build.get("seeds"),
            "method": method,
            "out": self._out(f"round-{number}", label),
        }
        if self.config.tokens and isinstance(document.get("student"), dict):
            document["student"] = _with_tokens(document["student"], len(teachers))
        where = f"{self.where}: train, method {label}"
        return validate_config(TrainConfig, document, where=where)

    def _out(self, *parts: str) -> str:
        return str(Path(self.config.out, *parts))


def _with_tokens(student: Document, count: int) -> Document:
    return {**student, "model_args": {**(student.get("model_args") or {}), "num_tokens": count}}


def run_cycle(config: CycleConfig, *, where: str, on_message: OnMessage) -> CycleTable:
    """Run the rounds that are not done yet. Writes the table after each round.

    Raises:
        NonFiniteError: no student of a round could be trained.
        KeyboardInterrupt: stopped; the same call goes on from there.
        KdCacheError: see the message; a mistake in the file is reported before any training.
    """
    plan = CyclePlan(config, where)
    check_cycle(plan)
    teachers, recorded = plan.first_teachers(), list[PlannedTeacher]()
    table = CycleTable(out=config.out, rounds=())
    for number in range(1, config.rounds + 1):
        round_ = plan.make_round(number, teachers)
        for teacher in round_.teachers:
            if teacher.build is not None and teacher not in recorded:
                record(teacher.build, title=f"recording {teacher.name}", on_message=on_message)
                recorded.append(teacher)
        outcomes = train_runs(round_.students, title=f"round {number}", on_message=on_message)
        table = CycleTable(out=config.out, rounds=(*table.rounds, _score(round_, outcomes)))
        _write(config.out, table)
        chosen = table.rounds[-1].chosen
        if chosen is None:
            reasons = "; ".join(f"{name}: {each.failure}" for name, each in outcomes.items())
            raise NonFiniteError(f"no student of round {number} could be trained: {reasons}")
        teachers = (*teachers, plan.next_teacher(number, chosen.method))
    return table


def check_cycle(plan: CyclePlan) -> None:
    """Validate every file of every round, and try every method on every number of teachers.

    Raises:
        ConfigError, UnsupportedError, DatasetError: one line; nothing was written.
        NotACacheError, SpecMismatchError, RowsNotBuiltError: a recorded cache cannot teach what the
            build file says.
    """
    teachers = plan.first_teachers()
    rounds = []
    for number in range(1, plan.config.rounds + 1):
        rounds.append(plan.make_round(number, teachers))
        teachers = (*teachers, plan.next_teacher(number, plan.labels[0]))
    build = teachers[-1].build
    assert build is not None
    check_students(
        [(student, each.teachers) for each in rounds for student in each.students.values()],
        recorded_like=build,
    )


def read_cycle(out: str) -> CycleTable:
    """The table that a cycle has written so far; empty where it has written none."""
    content = LocalStorage(out).get(JSON_NAME)
    if content is None:
        return CycleTable(out=out, rounds=())
    return CycleTable.model_validate_json(content)


def _score(round_: Round, outcomes: Mapping[str, Outcome]) -> RoundScore:
    scores = {name: outcome.history.last for name, outcome in outcomes.items() if outcome.history}
    top1 = {name: last.top1 for name, last in scores.items() if last is not None}
    chosen = max(top1, key=lambda name: top1[name], default=None)  # the first of equals
    return RoundScore(
        round=round_.number,
        teachers=tuple(teacher.name for teacher in round_.teachers),
        students=tuple(
            _student_score(name, outcome, chosen=name == chosen)
            for name, outcome in outcomes.items()
        ),
    )


def _student_score(name: str, outcome: Outcome, *, chosen: bool) -> StudentScore:
    out, history = outcome.config.out, outcome.history
    if history is None or history.last is None or history.best is None:
        return StudentScore(method=name, out=out, failure=outcome.failure)
    return StudentScore(
        method=name,
        out=out,
        top1=history.last.top1,
        top5=history.last.top5,
        best_top1=history.best.top1,
        best_epoch=history.best_epoch,
        chosen=chosen,
    )


def _write(out: str, table: CycleTable) -> None:
    storage = LocalStorage(out)
    storage.put(PAGE_NAME, table.page().encode())
    document = json.dumps(table.model_dump(mode="json"), indent=2, allow_nan=False)
    storage.put(JSON_NAME, f"{document}\n".encode())
    storage.sweep()
