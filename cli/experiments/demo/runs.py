"""The demo's training runs: the teacher, then the student every way. Finished ones are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from cache_service.config import Frozen
from cache_service.format.canonical import canonical_json, sha256_hex
from cache_service.storage.local import LocalStorage
from cache_service.teacher.settings import TeacherConfig
from cli.experiments.demo.files import BUILD, TEACHER
from cli.experiments.demo.result import Row, TrainedTeacher
from cli.experiments.demo.settings import WAYS, DemoSettings, Way
from cli.experiments.demo.way import Measured, OnEpoch, WayJob
from distill.checkpoint import CHECKPOINT_NAME
from distill.config import TrainConfig
from distill.events import Event
from distill.metrics import read_metrics
from distill.train import train

MEASURED_NAME = "measured.json"

Documents = dict[str, dict[str, Any]]
Say = Callable[[str], None]
Measure = Callable[[WayJob, OnEpoch], Measured]


class Kept(Frozen):
    """A measurement beside the digest of the job that it is of."""

    job: str
    measured: Measured


def train_teacher(documents: Documents, say: Say) -> TrainedTeacher:
    """Train the teacher, or go on with it, with the project's own trainer."""
    config = TrainConfig.model_validate(documents[TEACHER])

    def listen(event: Event) -> None:
        if event.kind == "evaluation":
            say(f"  epoch {event.epoch} of {config.epochs}: {event.values['eval_top1']:.1%} right")

    train(config, on_event=listen)
    lines = read_metrics(config.out)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    return TrainedTeacher(
        model=config.student.model,
        accuracy=epochs[-1]["eval_top1"],
        num_parameters=num_parameters(config.out),
        seconds=sum(line["epoch_s"] for line in epochs),
    )


class Planned(NamedTuple):
    """A way to train, and its measurement where an earlier run of the demo finished it."""

    way: Way
    job: WayJob
    kept: Measured | None


def plan_ways(documents: Documents, settings: DemoSettings) -> list[Planned]:
    """The ways, in order."""
    teacher = TeacherConfig.model_validate(documents[BUILD]["teacher"])
    planned = []
    for way in WAYS:
        job = WayJob(
            train=TrainConfig.model_validate(documents[way.name]),
            teacher=teacher if way.teacher == "live" else None,
            threads=settings.threads,
        )
        planned.append(Planned(way, job, _kept(job)))
    return planned


def train_ways(planned: Sequence[Planned], measure: Measure, say: Say) -> Iterator[Row]:
    """The student, every way in turn. A way that was cut short starts over.

    Half of a measurement from before a stop and half from after it would be neither.
    """
    for way, job, kept in planned:
        if kept is not None:
            say(f"  {way.title}: {kept.accuracy:.1%} right, from the run before")
        measured = kept or _measure_anew(job, way, measure, say)
        yield Row(way, measured)


def _measure_anew(job: WayJob, way: Way, measure: Measure, say: Say) -> Measured:
    storage = LocalStorage(job.train.out)
    storage.delete(CHECKPOINT_NAME)

    def on_epoch(epoch: int, accuracy: float) -> None:
        say(f"  {way.title}: epoch {epoch} of {job.train.epochs}, {accuracy:.1%} right")

    measured = measure(job, on_epoch)
    kept = Kept(job=_digest(job), measured=measured)
    storage.put(MEASURED_NAME, kept.model_dump_json().encode())
    storage.sweep()
    return measured


def _kept(job: WayJob) -> Measured | None:
    content = LocalStorage(job.train.out).get(MEASURED_NAME)
    if content is None:
        return None
    try:
        kept = Kept.model_validate_json(content)
    except ValidationError:  # of another version of the demo
        return None
    return kept.measured if kept.job == _digest(job) else None


def _digest(job: WayJob) -> str:
    return sha256_hex(canonical_json(job.model_dump(mode="json")))


def loss_curve(out: str) -> tuple[float, ...]:
    """Losses of the run in a folder, step by step."""
    return tuple(line["loss"] for line in read_metrics(out) if line["kind"] == "step")


def num_parameters(out: str) -> int:
    """Of the network that was trained into a folder."""
    start = next(line for line in read_metrics(out) if line["kind"] == "start")
    return int(start["num_parameters"])
