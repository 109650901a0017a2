"""One tiny demo, run once: 8 px views, two epochs, every student in this process."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from cli.experiments.demo.report import write_report
from cli.experiments.demo.run import DemoResult, run_demo
from cli.experiments.experiment_file import merge_documents
from cli.experiments.measure import measure_variant

BATCH_SIZE = 128
TINY = {
    "augment": {"size": 8, "ops": [{"op": "pad_crop", "padding": 1}]},
    "train": {"epochs": 2, "batch_size": BATCH_SIZE, "device": "cpu"},
    "teachers": {"teacher": {"epochs": 2}},
    "recordings": {"cache": {"seeds": "0:2", "scales": [1, 2], "device": "cpu"}},
}


class InThisProcess:
    """Trains and measures here, and remembers its jobs."""

    def __init__(self):
        self.jobs = []

    def measure(self, job, on_epoch):
        self.jobs.append(job)
        return measure_variant(job, on_epoch)


class Demo(NamedTuple):
    out: str
    result: DemoResult
    messages: list[str]
    jobs: list


def run_tiny(out, *, changes=None):
    workers, messages = InThisProcess(), []
    result = run_demo(
        out,
        changes=merge_documents(TINY, changes or {}),
        on_message=messages.append,
        measure=workers.measure,
    )
    write_report(result)
    return Demo(out, result, messages, workers.jobs)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    return run_tiny(str(tmp_path_factory.mktemp("demo") / "out"))
