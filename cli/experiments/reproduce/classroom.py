"""One teacher and its students on MNIST: the runs of a reproduction, started or taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cache_service.configfile import validate_config
from cache_service.errors import UntrainedTeacherError
from cli.experiments.reproduce.cohort import cohort_seconds, train_cohort
from cli.experiments.reproduce.hinton import (
    HintonSettings,
    Transfer,
    build_document,
    student_document,
    teacher_document,
)
from cli.experiments.reproduce.order import Order
from cli.experiments.reproduce.runs import count_wrong, record_teacher
from cli.experiments.reproduce.table import Measured
from distill.config import TrainConfig


class Runs(NamedTuple):
    """What students that shared a stream came to.

    Attributes:
        measured: test errors, one a seed.
        seconds: that they took together.
    """

    measured: tuple[Measured, ...]
    seconds: float = 0.0


class Classroom(NamedTuple):
    """The runs of one reproduction.

    Attributes:
        name: of the reproduction; its students and its cache lie in a folder of that name.
        settings: networks, lengths and rates.
        order: folders, seeds, and who is told.
        transfer: what students see.
        prefix: of the folders of this transfer set's runs, where a reproduction has several.
        omit: digits that the transfer set does not have.
    """

    name: str
    settings: HintonSettings
    order: Order
    transfer: Transfer
    prefix: str = ""
    omit: tuple[int, ...] = ()

    @property
    def cache(self) -> str:
        """The recording's folder."""
        return self.order.folder(self.name, f"{self.prefix}cache")

    def teacher_run(self) -> Runs:
        """The teacher, which has seen every digit; all reproductions share it."""
        documents = {"teacher": teacher_document(self.settings, self.order)}
        return self._train(documents, title="teacher")

    def label_runs(self) -> Runs:
        """A student on labels per seed."""
        return self._students("labels")

    def soft_runs(self, teacher: Runs) -> tuple[float, Runs]:
        """Seconds of recording, and a student on soft targets per seed.

        Without a teacher to record, each of these runs is a failure that names the reason.
        """
        seconds, problem = 0.0, teacher.measured[0].failure
        if problem is None:
            try:
                seconds = self._record()
            except UntrainedTeacherError as failure:
                problem = failure.message
        if problem is None:
            return seconds, self._students("soft")
        text = f"no soft targets: {problem}"
        failed = (Measured(seed=seed, failure=text) for seed in range(self.order.seeds))
        return seconds, Runs(tuple(failed))

    def soft_document(self, seed: int) -> dict[str, Any]:
        """The train file of a student on soft targets."""
        return self._document("soft", seed)

    def _record(self) -> float:
        document = build_document(
            self.settings, self.order, self.transfer, cache=self.cache, omit=self.omit
        )
        title = f"{self.name} {self.prefix}recording"
        return record_teacher(document, title=title, say=self.order.say)

    def _students(self, kind: str) -> Runs:
        documents = {f"seed-{seed}": self._document(kind, seed) for seed in range(self.order.seeds)}
        return self._train(documents, title=f"{self.name} {self.prefix}{kind}")

    def _train(self, documents: Mapping[str, dict[str, Any]], *, title: str) -> Runs:
        configs = {
            name: validate_config(TrainConfig, document, where=f"{title} {name}")
            for name, document in documents.items()
        }
        outcomes = train_cohort(configs, title=title, say=self.order.say)
        measured = tuple(outcome.measured(count_wrong) for outcome in outcomes.values())
        return Runs(measured, cohort_seconds(config.out for config in configs.values()))

    def _document(self, kind: str, seed: int) -> dict[str, Any]:
        return student_document(
            self.settings,
            self.order,
            self.transfer,
            seed=seed,
            out=self.order.folder(self.name, f"{self.prefix}{kind}-{seed}"),
            cache=self.cache if kind == "soft" else None,
            omit=self.omit,
        )
