"""Trains everything that an experiment compares: teachers, their recordings, then the students.

Runs that can share a stream of batches are trained together. Every run resumes from its checkpoint
and every recording from its shards, so the same call after a stop goes on where it was. A run that
diverges becomes a failure with its reason, and the others go on.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cache_service.errors import NonFiniteError, UntrainedTeacherError
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.context import BuildContext, open_build
from cache_service.recording.engines import prepare, run_local
from cache_service.recording.shards import Progress
from cache_service.storage.local import LocalStorage
from cli.experiments.experiment_check import check_experiment
from cli.experiments.experiment_file import ExperimentConfig, Figure, FigureKind, GoalConfig
from cli.experiments.html_report import Curve, render_experiment
from cli.experiments.result_table import Goal, Measured, Row, Table, render_markdown, show_mean
from distill.config import TrainConfig
from distill.multi_student import OWN
from distill.reporting import Event, read_metrics
from distill.scores import Evaluation
from distill.students import History, choose_device
from distill.trainer import train_students

OnMessage = Callable[[str], None]
"""Called with a line that says what is going on."""

SECONDS_SUFFIX = "-seconds.txt"
"""Of the file beside a cache that holds the time its recording took, over all starts."""

PACKAGES = ("kd-cache", "torch", "torchvision", "timm", "numpy", "zarr", "pillow")


def accuracy(evaluation: Evaluation) -> float:
    """Top-1 accuracy, %."""
    return round(100 * evaluation.top1, 4)


def error_rate(evaluation: Evaluation) -> float:
    """Top-1 error rate, %."""
    return round(100 - 100 * evaluation.top1, 4)


def count_errors(evaluation: Evaluation) -> int:
    """Number of top-1 errors."""
    return round((1 - evaluation.top1) * evaluation.num_samples)


FIGURE_OF: dict[FigureKind, Callable[[Evaluation], Figure]] = {
    "accuracy": accuracy,
    "error rate": error_rate,
    "errors": count_errors,
}


class Outcome(NamedTuple):
    """The end of one run.

    Attributes:
        config: its train file.
        history: its scores; None of a failure.
        failure: what stopped it.
        is_alone: no other student shared its epochs.
    """

    config: TrainConfig
    history: History | None = None
    failure: str | None = None
    is_alone: bool = False

    def measured(self, figure: Callable[[Evaluation], Figure], *, best: bool = True) -> Measured:
        """A figure after the last epoch and, if wanted, after the best one."""
        history, seed = self.history, self.config.seed
        if history is None or history.last is None or history.best is None:
            return Measured(seed=seed, failure=self.failure or "the run was not evaluated")
        return Measured(
            seed=seed,
            last=figure(history.last),
            best=figure(history.best) if best else None,
            best_epoch=history.best_epoch if best else None,
            epochs=self.config.epochs,
            seconds=epoch_seconds([self.config.out]) if self.is_alone else None,
        )


class Recording(NamedTuple):
    """A recorded teacher.

    Attributes:
        cache: its path or URL; None where there is none.
        seconds: that recording took.
        problem: why there is none.
    """

    cache: str | None = None
    seconds: float = 0.0
    problem: str | None = None


class ExperimentResult(NamedTuple):
    """All runs of an experiment."""

    config: ExperimentConfig
    teachers: Mapping[str, Outcome]
    recordings: Mapping[str, Recording]
    runs: Mapping[str, tuple[Outcome, ...]]

    def row(self, name: str) -> Row:
        """The figures of a teacher or of a variant, one a run."""
        outcomes = self.runs.get(name) or (self.teachers[name],)
        figure = FIGURE_OF[self.config.figure]
        return Row(
            what=self.config.title_of(name),
            published=self.config.published.get(name),
            runs=tuple(outcome.measured(figure) for outcome in outcomes),
        )

    def goals(self) -> tuple[Goal, ...]:
        """The goals of the file, held against the means."""
        return tuple(self._goal(goal) for goal in self.config.goals)

    def _goal(self, goal: GoalConfig) -> Goal:
        row, other = self.row(goal.row), None
        if goal.better_than is not None:
            other = self.row(goal.better_than)
        if row.mean is None or row.failures or (other is not None and other.mean is None):
            return Goal(text=goal.text, measured="a run failed", met=None)
        measured = show_mean(row, self.config.figure)
        if other is not None and other.mean is not None:
            measured += f", against {show_mean(other, self.config.figure)}"
            higher = self.config.figure == "accuracy"
            met = row.mean > other.mean if higher else row.mean < other.mean
        elif goal.at_least is not None:
            met = row.mean >= goal.at_least
        else:
            assert goal.at_most is not None
            met = row.mean <= goal.at_most
        return Goal(text=goal.text, measured=measured, met=met)

    def curves(self) -> dict[str, Curve]:
        """Test accuracy over epochs by row, the mean over the runs that did not fail."""
        curves = {}
        for name in (*self.teachers, *self.runs):
            outcomes = self.runs.get(name) or (self.teachers[name],)
            by_epoch: dict[float, list[float]] = {}
            for outcome in outcomes:
                for line in read_metrics(outcome.config.out) if outcome.failure is None else ():
                    if line["kind"] == "epoch" and line.get("eval_top1") is not None:
                        by_epoch.setdefault(line["epoch"], []).append(line["eval_top1"])
            if by_epoch:
                means = tuple(statistics.fmean(values) for values in by_epoch.values())
                curves[self.config.title_of(name)] = Curve(tuple(by_epoch), means)
        return curves

    def table(self, *, name: str, command: str, quick: bool, **parts: Any) -> Table:
        """The table of all rows; `parts` replace fields of it."""
        config = self.config
        students = [outcome for outcomes in self.runs.values() for outcome in outcomes]
        seconds = {
            "teachers": epoch_seconds(each.config.out for each in self.teachers.values()),
            "recordings": sum(each.seconds for each in self.recordings.values()),
            "students": epoch_seconds(each.config.out for each in students),
        }
        fields = {
            "rows": tuple(self.row(name) for name in (*self.teachers, *self.runs)),
            "title": config.title,
            "source": config.source,
            "notes": config.notes,
            "goals": self.goals(),
            "settings": config.settings(),
            "machine": describe_machine(students[0].config.device),
            "versions": describe_versions(),
            "seconds": {part: spent for part, spent in seconds.items() if spent},
            "unit": config.figure,
        }
        return Table(name=name, command=command, quick=quick, **(fields | parts))


def run_experiment(
    config: ExperimentConfig, *, where: str, on_message: OnMessage
) -> ExperimentResult:
    """Train and record everything that is not done yet. `where` names the experiment in messages.

    Raises:
        ConfigError, DatasetError, UnsupportedError, SpecMismatchError: the file, or a folder of
            other settings; a mistake in the file is reported before anything is trained.
        KeyboardInterrupt: stopped; the same call goes on from there.
    """
    check_experiment(config, where=where)
    teachers = train_teachers(config, where=where, on_message=on_message)
    recordings = record_teachers(config, teachers, where=where, on_message=on_message)
    runs = train_variants(config, recordings, where=where, on_message=on_message)
    return ExperimentResult(config, teachers, recordings, runs)


def train_variants(
    config: ExperimentConfig,
    recordings: Mapping[str, Recording],
    *,
    where: str,
    on_message: OnMessage,
) -> dict[str, tuple[Outcome, ...]]:
    """Train every student with every method, one run a seed; those without a recording fail."""
    configs: dict[str, TrainConfig] = {}
    failures: dict[str, str] = {}
    for variant in config.variants():
        problems = (recordings[name].problem for name in config.recordings_of(variant))
        problem = next((each for each in problems if each is not None), None)
        for seed in range(config.runs):
            name = f"{variant.name} seed {seed}"
            configs[name] = config.train_config(variant, seed, where=where)
            if problem is not None:
                failures[name] = problem
    trained = train_runs(
        {name: each for name, each in configs.items() if name not in failures},
        title=where,
        on_message=on_message,
    )
    outcomes = {
        name: trained.get(name) or Outcome(each, failure=failures[name])
        for name, each in configs.items()
    }
    return {
        variant.name: tuple(outcomes[f"{variant.name} seed {seed}"] for seed in range(config.runs))
        for variant in config.variants()
    }


def train_teachers(
    config: ExperimentConfig, *, where: str, on_message: OnMessage
) -> dict[str, Outcome]:
    """Train the teachers on labels, each on views of its own."""
    outcomes: dict[str, Outcome] = {}
    for name in config.teachers:
        train = config.teacher_config(name, where=where)
        outcomes |= _train_group({name: train}, title=f"{where}: teacher", on_message=on_message)
    return outcomes


def record_teachers(
    config: ExperimentConfig,
    teachers: Mapping[str, Outcome],
    *,
    where: str,
    on_message: OnMessage,
) -> dict[str, Recording]:
    """Record what is not recorded yet; a teacher that failed leaves a recording with a problem."""
    recordings = {}
    for name, recording in config.recordings.items():
        build = config.build_config(name, where=where)
        if build is None:
            recordings[name] = Recording(cache=config.cache_of(name))
            continue
        teacher = recording.get("teacher") if isinstance(recording, dict) else None
        failure = teachers[teacher].failure if isinstance(teacher, str) else None
        if failure is not None:
            recordings[name] = Recording(problem=f"no recording: {failure}")
            continue
        try:
            seconds = record(build, title=f"{where}: recording {name}", on_message=on_message)
            recordings[name] = Recording(cache=build.cache, seconds=seconds)
        except UntrainedTeacherError as refusal:
            reason = refusal.message.partition(". ")[0]  # advice comes after the first sentence
            recordings[name] = Recording(problem=f"no recording: {reason}")
    return recordings


def record(config: BuildConfig, *, title: str, on_message: OnMessage) -> float:
    """Open a build and record it; see `record_opened`."""
    return record_opened(open_build(config), title=title, on_message=on_message)


def record_opened(opened: BuildContext, *, title: str, on_message: OnMessage) -> float:
    """Record what is not recorded yet. Returns the seconds that all of it took, over all starts.

    Raises:
        UntrainedTeacherError: the teacher scores like chance.
        SpecMismatchError, KdCacheError: see the message.
    """
    config = opened.config
    folder, name = Path(config.cache).parent, Path(config.cache).name + SECONDS_SUFFIX
    storage = LocalStorage(str(folder))
    started = time.perf_counter()
    notes: list[str] = []
    prepare(opened, on_message=notes.append)
    rows_done = 0

    def on_progress(progress: Progress) -> None:
        nonlocal rows_done
        while notes:  # only of a recording that has work left
            on_message(f"{title}: {notes.pop(0)}")
        if progress.rows_done > rows_done:
            rows_done = progress.rows_done
            on_message(f"{title}: {rows_done:,} of {progress.rows_total:,} views recorded")

    committed = run_local(opened, seeds=config.seeds, on_progress=on_progress)
    seconds = float(storage.get(name) or 0)
    if committed:
        seconds = round(seconds + time.perf_counter() - started, 3)
        storage.put(name, f"{seconds}\n".encode())
        storage.sweep()
    else:
        on_message(f"{title}: recorded before")
    return seconds


def train_runs(
    configs: Mapping[str, TrainConfig], *, title: str, on_message: OnMessage
) -> dict[str, Outcome]:
    """Train runs by name, those of one stream together, or take the results that are there.

    Raises:
        KdCacheError: the runs cannot start.
        KeyboardInterrupt: stopped; the same call goes on from there.
    """
    groups: dict[str, dict[str, TrainConfig]] = {}
    for name, config in configs.items():
        stream = json.dumps(config.model_dump(mode="json", exclude={*OWN, "out"}), sort_keys=True)
        groups.setdefault(stream, {})[name] = config
    outcomes: dict[str, Outcome] = {}
    for group in groups.values():
        outcomes |= _train_group(group, title=title, on_message=on_message)
    return {name: outcomes[name] for name in configs}


def _train_group(
    configs: Mapping[str, TrainConfig], *, title: str, on_message: OnMessage
) -> dict[str, Outcome]:
    """Train students on one stream. One that diverges stops all; each then goes on alone."""
    try:
        first = next(iter(configs.values()))
        report = _EpochReport(title, on_message, first.epochs, len(configs))
        results = train_students(configs, on_event=report)
    except (NonFiniteError, torch.OutOfMemoryError) as problem:
        failure = problem.message if isinstance(problem, NonFiniteError) else str(problem)
        on_message(f"{title}: {', '.join(configs)}: failed: {failure}")
        if len(configs) == 1:
            return {name: Outcome(config, failure=failure) for name, config in configs.items()}
        outcomes: dict[str, Outcome] = {}
        for name, config in configs.items():
            outcomes |= _train_group({name: config}, title=title, on_message=on_message)
        return outcomes
    report.flush()
    if not report.has_reported:
        on_message(f"{title}: {', '.join(configs)}: finished before")
    return {
        name: Outcome(configs[name], result.history, is_alone=len(configs) == 1)
        for name, result in results.items()
    }


class _EpochReport:
    """A line for each epoch: the test accuracy of every student."""

    def __init__(self, title: str, on_message: OnMessage, epochs: int, num_students: int) -> None:
        self.has_reported = False
        self._title = title
        self._on_message = on_message
        self._epochs = epochs
        self._num_students = num_students
        self._epoch = 0
        self._scores: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        if event.kind != "epoch":
            return
        if event.epoch != self._epoch:  # some students had completed the epoch before
            self.flush()
        self._epoch = event.epoch
        score = event.values.get("eval_top1")
        shown = f"{score:.2%}" if isinstance(score, float) else "not evaluated"
        self._scores[event.student] = f"{event.student} {shown}"
        if len(self._scores) == self._num_students:
            self.flush()

    def flush(self) -> None:
        """Report the scores of the epoch that are known."""
        if self._scores:
            self.has_reported = True
            scores = ", ".join(self._scores.values())
            self._scores = {}
            self._on_message(f"{self._title}: epoch {self._epoch} of {self._epochs}: {scores}")


def epoch_seconds(outs: Iterable[str]) -> float:
    """Seconds of the epochs of the runs in these folders; shared epochs count once."""
    spent = {
        (line["epoch"], line["epoch_s"])
        for out in outs
        for line in read_metrics(out)
        if line["kind"] == "epoch"
    }
    return float(sum(seconds for _, seconds in spent))


class Written(NamedTuple):
    """The Markdown page of a result, and where all of its files are."""

    page: str
    paths: dict[str, str]


def write_results(table: Table, curves: Mapping[str, Curve], *, out: str, name: str) -> Written:
    """Write NAME.md, NAME.json and NAME.html into the folder `out`."""
    page = render_markdown(table)
    document = json.dumps(table.document(), indent=2, allow_nan=False)
    contents = {
        "markdown": (f"{name}.md", page),
        "json": (f"{name}.json", f"{document}\n"),
        "report": (f"{name}.html", render_experiment(table, curves)),
    }
    storage = LocalStorage(out)
    for file_name, text in contents.values():
        storage.put(file_name, text.encode())
    storage.sweep()
    return Written(page, {kind: str(Path(out, key)) for kind, (key, _) in contents.items()})


def describe_machine(device: str = "auto") -> dict[str, Any]:
    """Processor, cores, threads, and the device that `device` of a train file means here."""
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": "cpu",
    }
    chosen = choose_device(device)
    if chosen.type == "cuda":
        machine["device"] = torch.cuda.get_device_name(chosen)
    return machine


def describe_versions() -> dict[str, str]:
    """Python and the packages that figures may depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor()
    names = [line.partition(":")[2] for line in text.splitlines() if line.startswith("model name")]
    return names[0].strip() if names else platform.processor()
