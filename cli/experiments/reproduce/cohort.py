"""Students that share one stream, trained or taken up again: every batch is made once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from cache_service.errors import NonFiniteError
from cli.experiments.reproduce.order import Say
from cli.experiments.reproduce.resident import open_resident
from cli.experiments.reproduce.table import Figure, Measured
from distill.config import TrainConfig
from distill.events import Event
from distill.history import History
from distill.metrics import read_metrics
from distill.scores import Evaluation
from distill.train import train_students

Configs = Mapping[str, TrainConfig]


class Outcome(NamedTuple):
    """What came of one student.

    Attributes:
        config: its train file.
        history: its scores; None of a failure.
        failure: what stopped it.
    """

    config: TrainConfig
    history: History | None = None
    failure: str | None = None

    def measured(self, figure: Callable[[Evaluation], Figure], *, best: bool = True) -> Measured:
        """A figure of this run, after its last epoch and, if wanted, its best one."""
        history = self.history
        if history is None or history.last is None:
            return Measured(seed=self.config.seed, failure=self.failure or "nothing was scored")
        assert history.best is not None
        return Measured(
            seed=self.config.seed,
            last=figure(history.last),
            best=figure(history.best) if best else None,
            best_epoch=history.best_epoch if best else None,
            epochs=self.config.epochs,
        )


def train_cohort(
    configs: Configs, *, title: str, say: Say, resident: bool = True
) -> dict[str, Outcome]:
    """Train students on one stream, or take the runs that are there.

    One that diverges stops all; each then goes on alone, and only that one is a failure.

    Args:
        configs: train files by name.
        title: for what is told.
        say: who is told.
        resident: keep the images on the device where that can be.

    Raises:
        KdCacheError: the runs cannot start.
        KeyboardInterrupt: stopped; the same call goes on from there.
    """
    try:
        return _train(configs, title=title, say=say, resident=resident)
    except NonFiniteError as failure:
        say(f"{title}: failed: {failure}")
        if len(configs) == 1:
            return {
                name: Outcome(config, failure=failure.message) for name, config in configs.items()
            }
    outcomes: dict[str, Outcome] = {}
    for name, config in configs.items():
        outcomes |= train_cohort(
            {name: config}, title=f"{title} {name}", say=say, resident=resident
        )
    return outcomes


def cohort_seconds(outs: Iterable[str]) -> float:
    """Seconds spent in epochs by the students of these folders; shared ones count once."""
    spent = {
        (line["epoch"], line["epoch_s"])
        for out in outs
        for line in read_metrics(out)
        if line["kind"] == "epoch"
    }
    return float(sum(seconds for _, seconds in spent))


def _train(configs: Configs, *, title: str, say: Say, resident: bool) -> dict[str, Outcome]:
    shared = next(iter(configs.values()))
    stream = open_resident(list(configs.values())) if resident else None
    report = _Report(title, say, shared.epochs, len(configs))
    results = train_students(configs, stream=stream, on_event=report)
    report.flush()
    if not report.has_told:
        say(f"{title}: finished before")
    return {name: Outcome(configs[name], result.history) for name, result in results.items()}


class _Report:
    """A line an epoch: the share of the test set that each student has right."""

    def __init__(self, title: str, say: Say, epochs: int, num_students: int) -> None:
        self.has_told = False
        self._title = title
        self._say = say
        self._epochs = epochs
        self._num_students = num_students
        self._epoch = 0
        self._scores: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        if event.kind != "epoch":
            return
        if event.epoch != self._epoch:  # not every student was in the one before
            self.flush()
        self._epoch = event.epoch
        score = event.values.get("eval_top1")
        shown = f"{score:.2%}" if isinstance(score, float) else "not scored"
        self._scores[event.student] = f"{event.student} {shown}"
        if len(self._scores) == self._num_students:
            self.flush()

    def flush(self) -> None:
        """Tell what is known of the epoch."""
        if self._scores:
            self.has_told = True
            scores = ", ".join(self._scores.values())
            self._scores = {}
            self._say(f"{self._title}: epoch {self._epoch} of {self._epochs}: {scores}")
