"""Train students: from their train files to what they leave behind, resumed where they stopped.

The steps themselves are `distill.trainer`. A student alone is a list of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from cache_service.config import dump_yaml
from cache_service.interrupts import stop_on_signal
from cache_service.storage.local import LocalStorage
from distill.checkpoint import (
    CHECKPOINT_NAME,
    Payload,
    load_checkpoints,
    refuse_other_config,
    refuse_other_rows,
)
from distill.config import TrainConfig
from distill.evaluate import HeldOut
from distill.events import Listener
from distill.export import export_student
from distill.finite import FiniteWatch
from distill.history import History
from distill.metrics import metrics_files
from distill.randomness import private_random
from distill.several import refuse_apart_peers, refuse_unlike
from distill.step import TrainContext
from distill.stream import LiveStream, LiveTeacher, Stream, open_stream
from distill.student_state import ALONE, StudentState, make_student_state
from distill.students import Student, choose_device
from distill.trackers import trackers_of
from distill.trainer import Trainer, identity_of

CONFIG_NAME = "config.yaml"


class TrainResult(NamedTuple):
    """What a run ends with: the student as it is evaluated, and how it got there."""

    student: Student
    history: History


def train(
    config: TrainConfig,
    *,
    stream: Stream | None = None,
    teachers: Sequence[LiveTeacher] = (),
    on_event: Listener | None = None,
) -> TrainResult:
    """Train one student as a train file says; see `train_students`."""
    results = train_students({ALONE: config}, stream=stream, teachers=teachers, on_event=on_event)
    return results[ALONE]


def train_students(
    configs: Mapping[str, TrainConfig],
    *,
    stream: Stream | None = None,
    teachers: Sequence[LiveTeacher] = (),
    on_event: Listener | None = None,
) -> dict[str, TrainResult]:
    """Train students on one stream, each as its own train file says, or go on from checkpoints.

    Every batch is rendered once, and every teacher's answer to it decoded once, for all of them.
    Each student takes the very steps that it would have taken alone, and a resumed one those of an
    unbroken run. On the first Ctrl-C or SIGTERM the step under way is finished and kept.

    Args:
        configs: train files by the names of their students. They have one stream, so they differ
            in `out` and in what a student may have of its own; see `distill.several.OWN`.
        stream: batches from elsewhere than the files' dataset and caches.
        teachers: run these beside the students instead of reading recorded answers.
        on_event: told of every step, epoch and checkpoint that is reported.

    Raises:
        KeyboardInterrupt: stopped by a signal; the checkpoints hold everything so far.
        NonFiniteError: a loss is no number, and all stop; the last checkpoints are from before.
        ConfigError, SpecMismatchError: a checkpoint there is of another run.
        KdCacheError: dataset, caches, model and method do not suit each other; see the message.
    """
    shared = refuse_unlike(configs)
    device = choose_device(shared.device)
    saved = load_checkpoints({name: config.out for name, config in configs.items()})
    for name, payload in saved.items():
        refuse_other_config(_path(configs[name]), payload, configs[name].model_dump(mode="json"))
    if stream is None:
        seeds = next((payload["identity"]["seeds"] for payload in saved.values()), None)
        methods = [config.method for config in configs.values()]
        stream = open_stream(shared, device=device, seeds=seeds, methods=methods)
    if teachers:
        stream = LiveStream(stream, teachers)
    context = TrainContext(stream, device, FiniteWatch(device))
    with private_random(device), stop_on_signal() as stop, ExitStack() as stack:
        students = [
            make_student_state(configs[name], stream, device, name=name) for name in configs
        ]
        _go_on(context, students, saved)
        held_out = _open_held_out(shared, stream)
        for config in configs.values():
            _write_config(config)
        records = {
            student.name: stack.enter_context(
                metrics_files(
                    student.config.out,
                    step=student.history.step,
                    trackers=trackers_of(student.config, step=student.history.step),
                )
            )
            for student in students
        }
        Trainer(context, shared, students, held_out, records, on_event).train_epochs(stop)
    return {student.name: _finish(student, stream) for student in students}


def _go_on(
    context: TrainContext, students: Sequence[StudentState], saved: Mapping[str, Payload]
) -> None:
    """Put those that have a checkpoint where it was written."""
    for student in students:
        payload = saved.get(student.name)
        if payload is not None:
            refuse_other_rows(
                _path(student.config), payload, identity_of(context, students, student)
            )
            student.restore(payload, context.device)
        if student.predictions is not None:
            steps = context.stream.facts.plan.steps_per_epoch
            student.predictions.prune(student.history.step, steps_per_epoch=steps)
    refuse_apart_peers(students)


def _finish(student: StudentState, stream: Stream) -> TrainResult:
    config, num_classes = student.config, stream.facts.num_classes
    trained = Student(student.kept_model.eval(), student.preprocess)
    export_student(config.out, trained, name=config.student.model, num_classes=num_classes)
    return TrainResult(trained, student.history)


def _open_held_out(config: TrainConfig, stream: Stream) -> HeldOut | None:
    if config.evaluate is None:
        return None
    return HeldOut(
        config.evaluate,
        num_classes=stream.facts.num_classes,
        view_size=stream.facts.view_size,
        batch_size=config.batch_size,
        workers=config.workers,
        classes=stream.facts.classes,
    )


def _path(config: TrainConfig) -> Path:
    return Path(config.out) / CHECKPOINT_NAME


def _write_config(config: TrainConfig) -> None:
    """The train file in full, defaults included, beside what came of it."""
    text = dump_yaml(config.model_dump(mode="json"))
    storage = LocalStorage(config.out)
    storage.put(CONFIG_NAME, text.encode())
    storage.sweep()
