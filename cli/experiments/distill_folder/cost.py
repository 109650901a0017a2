"""What a distillation will cost, measured on a few images before it is paid for."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from cache_service.format.layout import CacheLayout
from cache_service.human_format import human_bytes, human_seconds
from cache_service.recording.context import BuildContext
from cache_service.recording.rates import Machine, measure_views, recording_rate
from cache_service.recording.record import num_workers
from cache_service.recording.shards import all_shards, not_recorded, num_rows
from cache_service.storage import open_storage
from distill.config import TrainConfig
from distill.reporting import read_metrics
from distill.students import choose_device, make_student

MEASURED_IMAGES = 8
"""Images of the student's measured update on a CPU, where the time per image hardly depends on
their number. A GPU is measured with a whole batch."""


class RecordingCost(NamedTuple):
    """Views to record.

    Attributes:
        rows, rows_pending: views of all seeds, and those that are not recorded yet.
        num_bytes: of all views, uncompressed.
        seconds: for the pending views.
        render_rows_per_s: measured rate of rendering in one process; None if nothing is pending.
    """

    rows: int
    rows_pending: int
    num_bytes: int
    seconds: float
    render_rows_per_s: float | None

    @property
    def text(self) -> str:
        """For people."""
        size = f"{self.rows:,} views, {human_bytes(self.num_bytes)}"
        if not self.rows_pending:
            return f"{size}, recorded before"
        pending = (
            "" if self.rows_pending == self.rows else f"{self.rows_pending:,} of them pending, "
        )
        return f"{size}, {pending}about {human_seconds(self.seconds)}"


class TrainingCost(NamedTuple):
    """Runs to train.

    Attributes:
        epochs: that all runs together have left.
        seconds: for them.
    """

    epochs: int
    seconds: float

    @property
    def text(self) -> str:
        """For people."""
        if not self.epochs:
            return "trained before"
        many = f"{self.epochs:,} epochs in all" if self.epochs > 1 else "one epoch"
        return f"{many}, about {human_seconds(self.seconds)}"


def recording_cost(build: BuildContext) -> RecordingCost:
    """Measure the teacher and the rendering on a few batches. Writes nothing."""
    spec, seeds = build.spec, build.config.seeds
    pending = not_recorded(open_storage(build.config.cache), spec, all_shards(spec, seeds))
    rows, rows_pending = len(seeds) * spec.dataset.num_samples, num_rows(spec, pending)
    if not rows_pending:
        return RecordingCost(rows, 0, rows * CacheLayout(spec).row_bytes, 0.0, None)
    cost = measure_views(build)
    workers, processes = num_workers(build, pending), build.config.processes
    rate, _ = recording_rate(cost, Machine.of(build), workers=workers, processes=processes)
    num_bytes = rows * CacheLayout(spec).row_bytes
    return RecordingCost(rows, rows_pending, num_bytes, rows_pending / rate, 1 / cost.render_s)


def training_cost(
    runs: Iterable[TrainConfig],
    *,
    num_samples: int,
    num_classes: int,
    render_rows_per_s: float | None = None,
) -> TrainingCost:
    """Measure one update of the student. Views are rendered once for all runs.

    Without a rate of rendering, the time is that of the updates alone.
    """
    configs = list(runs)
    left = [config.epochs - _epochs_done(config.out) for config in configs]
    if not any(left):
        return TrainingCost(0, 0.0)
    update_s = _update_seconds(configs[0], num_classes=num_classes)
    render_s = 1 / (render_rows_per_s * max(1, configs[0].workers)) if render_rows_per_s else 0.0
    seconds = num_samples * max(sum(left) * update_s, max(left) * render_s)
    return TrainingCost(sum(left), seconds)


def _epochs_done(out: str) -> int:
    done = [line["epoch"] for line in read_metrics(out) if line["kind"] == "epoch"]
    return max(done, default=0)


def _update_seconds(config: TrainConfig, *, num_classes: int) -> float:
    """Seconds per image of a forward and a backward pass."""
    assert config.augment is not None
    device, size = choose_device(config.device), config.student.input_size or config.augment.size
    student = make_student(
        config.student, num_classes=num_classes, view_size=size, teacher=None, seed=config.seed
    )
    model = student.model.to(device).train()
    count = MEASURED_IMAGES if device.type == "cpu" else config.batch_size
    images_B3HW = torch.zeros(count, 3, size, size, device=device)
    labels_B = torch.zeros(count, dtype=torch.int64, device=device)
    seconds = 0.0
    for _ in range(2):  # the first one initializes the device
        started = time.perf_counter()
        loss = cross_entropy(model(images_B3HW), labels_B)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    return seconds / count
