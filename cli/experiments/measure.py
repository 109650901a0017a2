"""Trains one student in a process of its own, and measures its time and memory.

All processes of a measurement start at once, at the beginning, and load their libraries together.
Each then waits for its job, so that nothing is loading while something is timed. Everything that
the variants load in common is imported here, before memory is measured.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sklearn.datasets  # noqa: F401  what `digits` loads when it is opened
import timm  # noqa: F401  what networks are made with
import torch
from torch import Tensor

from cache_service.config import Frozen
from cache_service.datasets import open_dataset
from cache_service.errors import KdCacheError, error_from_document
from cache_service.processes import INTERRUPTED, ChildProcess, ParentConnection, module_command
from cache_service.teacher.settings import TeacherConfig
from cache_service.teacher.teacher import load_teacher
from distill.config import TrainConfig
from distill.methods import TeacherFacts
from distill.reporting import Event
from distill.stream import LiveTeacher
from distill.students import choose_device
from distill.trainer import train

OnEpoch = Callable[[int, float], None]
"""Called with the epochs completed and the test accuracy."""

STOP_S = 20.0
"""Time for a process to finish its step and save it, before it is killed."""

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class VariantJob(Frozen):
    """One run: its train file, and the teacher that runs beside the student, if one does.

    Attributes:
        train: train file of the student.
        teacher: teacher that runs beside it.
        scales: grids of cells that the live teacher answers.
        threads: CPU threads of torch.
    """

    train: TrainConfig
    teacher: TeacherConfig | None = None
    scales: tuple[int, ...] = (1,)
    threads: int = 1


class Measured(Frozen):
    """The accuracy and the cost of one run.

    Attributes:
        curve: test accuracy after each epoch.
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


class MeasuringProcesses:
    """So many fresh processes; each takes one job. A context: at its end none is left."""

    def __init__(self, count: int, *, threads: int) -> None:
        self._count = count
        self._threads = threads
        self._idle: list[ChildProcess] = []

    def __enter__(self) -> Self:
        environment = {"OMP_NUM_THREADS": str(self._threads)}
        command = module_command("cli.experiments.measure")
        self._idle = [ChildProcess(command, environment=environment) for _ in range(self._count)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _stop(self._idle)

    def measure(self, job: VariantJob, on_epoch: OnEpoch) -> Measured:
        """The job's measurement, from a process that has done nothing else.

        Raises:
            KeyboardInterrupt: this process was asked to stop; the child has stopped before.
            KdCacheError: what the child refused, or that it died.
        """
        child = self._idle.pop(0)
        try:
            child.send(job.model_dump(mode="json"))
            last = _last_message(child, on_epoch)
            status = child.wait()
        finally:
            _stop([child])
        if "measured" in last:
            return Measured.model_validate(last["measured"])
        if "error" in last:
            raise error_from_document(last["error"])
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        raise KdCacheError(
            f"the process that trained into {job.train.out} ended with status {status}; its "
            "messages are above."
        )


def _last_message(child: ChildProcess, on_epoch: OnEpoch) -> dict[str, Any]:
    """The last message; epochs are passed on."""
    while (message := child.receive()) is not None:
        if "epoch" not in message:
            return message
        on_epoch(*message["epoch"])
    return {}


def _stop(children: Sequence[ChildProcess]) -> None:
    for child in children:
        child.terminate()
    for child in children:
        child.stop(STOP_S)


def measure_variant(job: VariantJob, on_epoch: OnEpoch) -> Measured:
    """Train as the job says, in this process.

    Raises:
        KeyboardInterrupt: stopped by a signal.
        KdCacheError: whatever training refuses.
    """
    device = choose_device(job.train.device)
    peak, clock = PeakMemory(device), StepClock(on_epoch)
    teachers: tuple[LiveTeacher, ...] = ()
    if job.teacher is not None:
        teachers = (live_teacher(job.teacher, job.train, device, scales=job.scales),)
    train(job.train, teachers=teachers, on_event=clock)
    return Measured(
        curve=tuple(clock.curve),
        seconds_per_step=statistics.median(clock.seconds),
        peak_memory_bytes=peak.above_start(),
        device=device.type,
    )


class StepClock:
    """A listener that times steps. Every step must be reported."""

    def __init__(self, on_epoch: OnEpoch) -> None:
        self.seconds: list[float] = []
        self.curve: list[float] = []
        self._on_epoch = on_epoch
        self._before: float | None = None

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        now = time.perf_counter()
        if event.kind != "step":
            # Evaluating and saving lie between the last step of an epoch and the next one.
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


class PeakMemory:
    """The most memory that a run takes, from the creation of this object on.

    On a GPU this counts what torch allocates there; elsewhere the resident memory of the process.
    Libraries that are loaded before do not count, those loaded later do.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            _reset_peak()
            self._before = _peak_resident_bytes()

    def above_start(self) -> int:
        """Bytes at the peak beyond those at the start."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _peak_resident_bytes() - self._before


def _reset_peak() -> None:
    """Make the present size the peak, where the system can. Loading libraries has a peak too."""
    if CLEAR_REFS.exists():
        try:
            CLEAR_REFS.write_text("5")
        except OSError:  # some containers forbid it; then a smaller run may show as 0
            return


def _peak_resident_bytes() -> int:
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return int(value.split()[0]) * 1024  # kB means 1,024 bytes there
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def live_teacher(
    config: TeacherConfig,
    train: TrainConfig,
    device: torch.device,
    *,
    scales: tuple[int, ...] = (1,),
) -> LiveTeacher:
    """The recorded teacher, to run beside a student.

    It computes as it does for a recording (precision, memory format, exact kernels), but its logits
    stay on the device, and cells that no method needs are not computed: this is as fast as a live
    teacher can be.
    """
    assert train.augment is not None, "a live teacher's views come from a recipe"
    classes = open_dataset(train.dataset).id.num_classes
    teacher = load_teacher(
        config,
        scales=scales,
        num_classes=classes,
        view_size=train.augment.size,
        device=str(device),
        store_all=True,
    )

    def logits(views_BHW3: Tensor) -> Tensor:
        return teacher.answer_on_device(views_BHW3).float()

    facts = TeacherFacts(
        scales, teacher.id.num_classes, pooling=config.pooling, preprocess=teacher.id.preprocess
    )
    return LiveTeacher(facts, logits)


def main() -> int:
    """Do the job that the parent sends. Returns the exit status."""
    parent = ParentConnection()
    message = parent.receive()
    if message is None:  # the parent is gone
        return 0
    job = VariantJob.model_validate(message)
    torch.set_num_threads(job.threads)
    try:
        measured = measure_variant(job, lambda *epoch: parent.send({"epoch": epoch}))
    except KdCacheError as refusal:
        parent.send({"error": refusal.as_document()})
        return refusal.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    parent.send({"measured": measured.model_dump(mode="json")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
