"""The runs of one pair of the scale decoupled tables: a teacher, its recording, its students."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cache_service.models.create import create_model
from cache_service.models.features import check_cells
from cli.experiments.reproduce.cohort import Outcome
from cli.experiments.reproduce.school import Document, Recording, School, accuracy, seconds_of
from cli.experiments.reproduce.sdd import METHODS, SddSettings, method_document
from cli.experiments.reproduce.sdd_pairs import Pair
from cli.experiments.reproduce.table import Measured, Row


class Lesson(NamedTuple):
    """All runs of one pair."""

    pair: Pair
    teacher: Outcome
    recording: Recording
    students: Mapping[tuple[str, int], Outcome]

    def row(self, method: str) -> Row:
        """The runs of a method, one per seed."""
        runs = [run for (name, _), run in self.students.items() if name == method]
        return self._row(
            f"student, {title_of(method)}", method, [run.measured(accuracy) for run in runs]
        )

    def rows(self) -> tuple[Row, ...]:
        """The teacher, and each method."""
        teacher = self._row("teacher", "teacher", [self.teacher.measured(accuracy)])
        return (teacher, *(self.row(method) for method in METHODS))

    def seconds(self) -> dict[str, float]:
        """By part."""
        title = self.pair.title
        students = {f"{name}-{seed}": run for (name, seed), run in self.students.items()}
        return {
            f"teacher {self.pair.title.partition(' -> ')[0]}": seconds_of({"": self.teacher}),
            f"{title}: recording": self.recording.seconds,
            f"{title}: {len(students)} students together": (
                seconds_of(students) if self.recording.cache is not None else 0.0
            ),
        }

    def _row(self, what: str, column: str, runs: Sequence[Measured]) -> Row:
        published = self.pair.published.get(column)
        return Row(what=f"{self.pair.title}: {what}", published=published, runs=tuple(runs))


def fit_cells(pair: Pair, size: int) -> Pair:
    """Without the grids that are finer than the maps of these networks; in full forms none is."""
    nets = [
        create_model(net["model"], num_classes=2, seed=0, **net["model_args"])
        for net in (pair.teacher, pair.student)
    ]
    side = min(check_cells(net, size).map_side for net in nets)
    kept = tuple(scale for scale in pair.scales if scale <= side)
    return pair.model_copy(update={"scales": kept})


def teach_pair(school: School, settings: SddSettings, pair: Pair) -> Lesson:
    """Train and record the teacher, and train all students on what it said."""
    name = _folder(pair.teacher)
    teacher = school.teach(pair.teacher, settings.teaching, name=name)
    cells = "-".join(str(side) for side in pair.scales)
    recording = school.record(
        teacher,
        name=f"{name}-{cells}",
        recorded=settings.recorded,
        recording={"scales": list(pair.scales), "codec": settings.codec.model_dump(mode="json")},
    )
    keys = [(method, seed) for method in METHODS for seed in range(school.order.seeds)]
    if recording.cache is None:
        failed = {
            (method, seed): Outcome(
                teacher.config.model_copy(update={"seed": seed}), failure=recording.problem
            )
            for method, seed in keys
        }
        return Lesson(pair, teacher, recording, failed)
    learns = {"caches": recording.cache, "seeds": f"0:{settings.recorded}"}
    rate = {"lr": settings.light_lr} if pair.light else {}
    optimizer = settings.training.optimizer.model_dump(mode="json") | rate
    own = {
        f"{method}-{seed}": {
            "student": pair.student,
            "method": method_document(method, settings, pair),
            "optimizer": optimizer,
            "seed": seed,
        }
        for method, seed in keys
    }
    folder = f"{name}-{_folder(pair.student)}"
    outcomes = school.train(own, settings.training, folder=folder, learns=learns)
    students = {(method, seed): outcomes[f"{method}-{seed}"] for method, seed in keys}
    return Lesson(pair, teacher, recording, students)


def _folder(net: Document) -> str:
    sizes = "-".join(str(value) for value in net["model_args"].values())
    plain = "".join(letter if letter.isalnum() else "-" for letter in sizes).strip("-")
    return f"{net['model'].rpartition(':')[2]}{'-' if plain else ''}{plain}".replace("--", "-")


def title_of(method: str) -> str:
    """Of a method, as the paper writes it."""
    return "labels" if method == "ce" else method.upper()
