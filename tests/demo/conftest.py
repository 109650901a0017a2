"""One tiny demo, run once: 8 px views, two epochs, every way in this process."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import pytest

from cli.experiments.demo.result import DemoResult
from cli.experiments.demo.run import run_demo
from cli.experiments.demo.settings import DemoSettings
from cli.experiments.demo.way import measure_way

TINY = DemoSettings(
    view_size=8, padding=1, scales=(1, 2), teacher_epochs=2, epochs=2, batch_size=128, device="cpu"
)


class InThisProcess:
    """Trains and measures here, and remembers what it was asked for."""

    def __init__(self):
        self.jobs = []

    def measure(self, job, on_epoch):
        self.jobs.append(job)
        return measure_way(job, on_epoch)


class Demo(NamedTuple):
    out: str
    result: DemoResult
    said: list[str]
    jobs: list


def run_tiny(out, *, settings=TINY):
    workers, said = InThisProcess(), []
    result = run_demo(out, settings=settings, say=said.append, workers=nullcontext(workers))
    return Demo(out, result, said, workers.jobs)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    return run_tiny(str(tmp_path_factory.mktemp("demo") / "out"))
