"""Train the student one way, and measure it. As a program: one way in a process of its own.

A job comes in as JSON on standard input; epochs, then the measurement or a refusal, go out as JSON
lines on standard output. Everything that four ways load in common is imported up here, before the
memory is measured.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import sklearn.datasets  # noqa: F401  what `digits` loads when it is opened
import timm  # noqa: F401  what networks are made with
import torch
from torch import Tensor

from cache_service.config import Frozen
from cache_service.datasets import open_dataset
from cache_service.errors import KdCacheError
from cache_service.models.preprocess import prepare_views
from cache_service.processes import INTERRUPTED, ParentConnection
from cache_service.teacher.settings import TeacherConfig
from cache_service.teacher.teacher import exact_kernels, load_teacher
from cli.experiments.demo.memory import PeakMemory
from distill.config import TrainConfig
from distill.events import Event
from distill.methods import TeacherFacts
from distill.stream import LiveTeacher
from distill.students import choose_device
from distill.train import train

OnEpoch = Callable[[int, float], None]
"""Told of the epochs completed and the share of test images right."""


class WayJob(Frozen):
    """One way: its train file, and for a live teacher who that is."""

    train: TrainConfig
    teacher: TeacherConfig | None = None
    threads: int = 1


class Measured(Frozen):
    """What one way gave and cost.

    Attributes:
        curve: share of test images right after each epoch.
        seconds_per_step: median over steps, each from batch to update.
        peak_memory_bytes: above the start of the run.
        device: where it ran.
    """

    curve: tuple[float, ...]
    seconds_per_step: float
    peak_memory_bytes: int
    device: str

    @property
    def accuracy(self) -> float:
        """After the last epoch, not the best one."""
        return self.curve[-1]


def measure_way(job: WayJob, on_epoch: OnEpoch) -> Measured:
    """Train as the job says, in this process.

    Raises:
        KeyboardInterrupt: stopped by a signal.
        KdCacheError: whatever training refuses.
    """
    device = choose_device(job.train.device)
    peak, clock = PeakMemory(device), StepClock(on_epoch)
    teachers = () if job.teacher is None else (live_teacher(job.teacher, job.train, device),)
    train(job.train, teachers=teachers, on_event=clock)
    return Measured(
        curve=tuple(clock.curve),
        seconds_per_step=statistics.median(clock.seconds),
        peak_memory_bytes=peak.above_start(),
        device=device.type,
    )


class StepClock:
    """A listener that times steps, of which every one must be reported."""

    def __init__(self, on_epoch: OnEpoch) -> None:
        self.seconds: list[float] = []
        self.curve: list[float] = []
        self._on_epoch = on_epoch
        self._before: float | None = None

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        now = time.perf_counter()
        if event.kind != "step":
            # Scoring and saving lie between the last step of an epoch and the next one.
            self._before = None
            if event.kind == "evaluation":
                accuracy = event.values["eval_top1"]
                assert isinstance(accuracy, float)
                self.curve.append(accuracy)
                self._on_epoch(event.epoch, accuracy)
            return
        if self._before is not None:
            self.seconds.append(now - self._before)
        self._before = now


def live_teacher(config: TeacherConfig, train: TrainConfig, device: torch.device) -> LiveTeacher:
    """The recorded teacher, to run beside a student. It answers for whole images only.

    Its answers stay on the device, and cells that nobody asks for are not computed: as fast as a
    live teacher gets.
    """
    assert train.augment is not None, "a live teacher's views come from a recipe"
    classes = open_dataset(train.dataset).id.num_classes
    teacher = load_teacher(
        config, scales=(1,), num_classes=classes, view_size=train.augment.size, device=str(device)
    )

    def answer(views_BHW3: Tensor) -> Tensor:
        images_B3HW = prepare_views(
            views_BHW3,
            teacher.id.preprocess,
            device=teacher.device,
            channels_last=teacher.channels_last,
        )
        with exact_kernels():
            return teacher.run_logits(images_B3HW).float()

    facts = TeacherFacts((1,), teacher.id.num_classes, preprocess=teacher.id.preprocess)
    return LiveTeacher(facts, answer)


def main() -> int:
    """Do the job that the parent sends. Returns the exit status."""
    parent = ParentConnection()
    message = parent.receive()
    if message is None:  # the parent is gone
        return 0
    job = WayJob.model_validate(message)
    torch.set_num_threads(job.threads)
    try:
        measured = measure_way(job, lambda *epoch: parent.send({"epoch": epoch}))
    except KdCacheError as refusal:
        parent.send({"error": refusal.as_document()})
        return refusal.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    parent.send({"measured": measured.model_dump(mode="json")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
