"""One teacher and its students on MNIST: the runs of a reproduction, started or taken up again."""

from __future__ import annotations

from typing import Any, NamedTuple

from cache_service.errors import UntrainedTeacherError
from cli.reproduce.hinton import (
    HintonSettings,
    Transfer,
    build_document,
    student_document,
    teacher_document,
)
from cli.reproduce.order import Order
from cli.reproduce.runs import record_teacher, train_run
from cli.reproduce.table import Measured


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

    def teacher_run(self) -> Measured:
        """The teacher, which has seen every digit; all reproductions share it."""
        document = teacher_document(self.settings, self.order)
        return train_run(document, title="teacher", say=self.order.say)

    def label_runs(self) -> tuple[Measured, ...]:
        """A student on labels per seed."""
        return tuple(self._train("labels", seed) for seed in range(self.order.seeds))

    def soft_runs(self, teacher: Measured) -> tuple[float, tuple[Measured, ...]]:
        """Seconds of recording, and a student on soft targets per seed.

        Without a teacher to record, each of these runs is a failure that names the reason.
        """
        seconds, problem = 0.0, teacher.failure
        if problem is None:
            try:
                seconds = self._record()
            except UntrainedTeacherError as failure:
                problem = failure.message
        seeds = range(self.order.seeds)
        if problem is not None:
            failure_text = f"no soft targets: {problem}"
            return seconds, tuple(Measured(seed=seed, failure=failure_text) for seed in seeds)
        return seconds, tuple(self._train("soft", seed) for seed in seeds)

    def soft_document(self, seed: int) -> dict[str, Any]:
        """The train file of a student on soft targets."""
        return self._document("soft", seed)

    def _record(self) -> float:
        document = build_document(
            self.settings, self.order, self.transfer, cache=self.cache, omit=self.omit
        )
        title = f"{self.name} {self.prefix}recording"
        return record_teacher(document, title=title, say=self.order.say)

    def _train(self, kind: str, seed: int) -> Measured:
        title = f"{self.name} {self.prefix}{kind} seed {seed}"
        return train_run(self._document(kind, seed), title=title, say=self.order.say)

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
