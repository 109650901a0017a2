"""What the demo found, as plain values: the table, the report and `--json` all read these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cli.experiments.demo.settings import DemoSettings, Way
from cli.experiments.demo.way import Measured


class Row(NamedTuple):
    """One way and what it gave and cost."""

    way: Way
    measured: Measured


class Agreement(NamedTuple):
    """Losses of the same steps from the same weights, with either teacher.

    Attributes:
        live: with the live teacher, nats.
        cached: from the cache.
        tolerance: what rounding the teacher's answers to float16 may make of it, nats.
    """

    live: tuple[float, ...]
    cached: tuple[float, ...]
    tolerance: float

    @property
    def max_abs_difference(self) -> float:
        """Largest over all steps, nats."""
        return max(abs(a - b) for a, b in zip(self.live, self.cached, strict=True))

    @property
    def holds(self) -> bool:
        """Whether it is within the tolerance at every step."""
        return self.max_abs_difference <= self.tolerance


class CellGrid(NamedTuple):
    """The teacher's answers to the cells of one scale, m x m, row by row.

    Attributes:
        scale: m.
        top: the likeliest class.
        label_logit: logit of the class that is on the label.
        complementary: whether exactly one of the verdicts on cell and image names the label.
    """

    scale: int
    top: tuple[int, ...]
    label_logit: tuple[float, ...]
    complementary: tuple[bool, ...]


class SampleView(NamedTuple):
    """One recorded view, replayed, and what the cache holds about it.

    Attributes:
        pixels_HW3: uint8.
        likeliest: (class, logit, probability) of the whole image, best first.
    """

    seed: int
    position: int
    sample: int
    label: int
    classes: tuple[str, ...]
    pixels_HW3: NDArray[np.uint8]
    likeliest: tuple[tuple[int, float, float], ...]
    grids: tuple[CellGrid, ...]


class Recording(NamedTuple):
    """The cache.

    Attributes:
        stored_bytes: of all its files.
        seconds: that recording took, over all runs of the demo; None where nobody timed it.
    """

    url: str
    fingerprint: str
    views: int
    seeds: str
    scales: tuple[int, ...]
    stored_scales: tuple[int, ...]
    bytes_per_view: int
    stored_bytes: int
    seconds: float | None


class TrainedTeacher(NamedTuple):
    """The teacher, as the demo trained it.

    Attributes:
        accuracy: on the test images.
        seconds: of its training steps.
    """

    model: str
    accuracy: float
    num_parameters: int
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo measured.

    Attributes:
        agreement: of single steps.
        live_losses, cached_losses: of the two whole trainings by KD, step by step.
        files: texts of the files it ran, by name.
    """

    out: str
    settings: DemoSettings
    rows: tuple[Row, ...]
    agreement: Agreement
    live_losses: tuple[float, ...]
    cached_losses: tuple[float, ...]
    teacher: TrainedTeacher
    student_parameters: int
    recording: Recording
    sample: SampleView
    files: dict[str, str]

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return self.rows[0].measured.device

    def measured(self, way: Way) -> Measured:
        """Of one way."""
        return next(row.measured for row in self.rows if row.way == way)

    def document(self, report: str) -> dict[str, Any]:
        """The table and its context, for `--json`."""
        return {
            "out": self.out,
            "report": report,
            "device": self.device,
            "rows": [
                {
                    "name": row.way.name,
                    "title": row.way.title,
                    "accuracy": row.measured.accuracy,
                    "seconds_per_step": row.measured.seconds_per_step,
                    "peak_memory_bytes": row.measured.peak_memory_bytes,
                    "accuracy_by_epoch": list(row.measured.curve),
                }
                for row in self.rows
            ],
            "losses_equal": {
                "steps": len(self.agreement.live),
                "max_abs_difference": self.agreement.max_abs_difference,
                "tolerance": self.agreement.tolerance,
                "holds": self.agreement.holds,
            },
            "teacher": {
                "model": self.teacher.model,
                "accuracy": self.teacher.accuracy,
                "num_parameters": self.teacher.num_parameters,
                "train_seconds": self.teacher.seconds,
            },
            "student": {"num_parameters": self.student_parameters},
            "cache": self.recording._asdict(),
        }
