"""`bench total`: recording and training against training with the live teacher.

One recording serves any number of students and any number of passes. The table says after how many
passes over a seed its recording has paid for itself.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from cache_service.recording.context import open_build
from cache_service.recording.engines import prepare
from cli.experiments.bench.build import recording_rate
from cli.experiments.bench.loops import StepLoop
from cli.experiments.bench.page import BenchOptions, BenchPage, Figures
from cli.experiments.bench.pairs import Pair, build_file, pair_title
from cli.experiments.bench.variants import CACHE_KD, LIVE_KD

STUDENTS = (1, 2, 4, 8)
"""Numbers of students, trained one after the other."""


class Sizes(NamedTuple):
    """How much is measured: the student's batches of an epoch, epochs, rounds and their steps."""

    batches: int
    epochs: int
    rounds: int
    steps: int


FULL = Sizes(batches=48, epochs=2, rounds=4, steps=16)
ON_CPU = Sizes(batches=8, epochs=2, rounds=3, steps=4)
QUICK = Sizes(batches=4, epochs=2, rounds=2, steps=4)


class Seconds(NamedTuple):
    """Seconds a view, each a median: its recording, and training on it."""

    record: float
    cached: float
    live: float


def measure_total(pair: Pair, options: BenchOptions) -> Figures:
    """Measure one pair, and compare for several numbers of students."""
    sizes = QUICK if options.quick else (FULL if options.on_gpu else ON_CPU)
    options.on_message(f"{pair.name}: recording {sizes.epochs} epochs, then training")
    with tempfile.TemporaryDirectory() as folder:
        seconds = _measure(pair, Path(folder), sizes, options)
    return [figure_of(pair, seconds, students) for students in STUDENTS]


def _measure(pair: Pair, folder: Path, sizes: Sizes, options: BenchOptions) -> Seconds:
    samples = sizes.batches * pair.batch_size
    config = build_file(
        pair, folder, device=options.device, num_samples=samples, seeds=sizes.epochs
    )
    build = open_build(config)
    prepare(build)
    record = 1 / recording_rate(build, config.seeds)
    del build
    first = config.model_copy(update={"seeds": (0,), "workers": 0})
    held = not pair.is_small
    loops = [StepLoop(pair, first, each, folder, held=held) for each in (CACHE_KD, LIVE_KD)]
    for loop in loops:
        loop.run(sizes.steps)
    views = sizes.steps * pair.batch_size
    rounds = [[loop.run(sizes.steps) / views for loop in loops] for _ in range(sizes.rounds)]
    cached, live = (statistics.median(column) for column in zip(*rounds, strict=True))
    return Seconds(record, cached, live)


def figure_of(pair: Pair, seconds: Seconds, students: int) -> dict[str, Any]:
    """Compare one epoch of some students. Passes are counted until the recording is cheaper."""
    saved = students * (seconds.live - seconds.cached)
    passes = None
    if saved > 0:
        passes = next(n for n in itertools.count(1) if n * saved >= seconds.record)
    return {
        "pair": pair.name,
        "students": students,
        "seconds_a_view": seconds._asdict(),
        "recorded_over_live": (seconds.record + students * seconds.cached)
        / (students * seconds.live),
        "passes_to_break_even": passes,
    }


def total_page(figures: Figures, options: BenchOptions) -> BenchPage:
    """The page of the figures."""
    return BenchPage(
        name="total",
        title="Recording and training against training with a live teacher",
        notes=[
            (
                "Time of an epoch with KD: a recording and n trainings from it, over n trainings "
                "with the live teacher. The last column is the number of passes over one seed "
                "after which its recording is paid for. Training steps are those of `bench "
                "step`, start-up is left out, and the recording renders its views with loader "
                "processes."
            ),
            options.arithmetic,
        ],
        header=("teacher -> student", "students", "recorded / live", "passes to break even"),
        rows=[_row(each) for each in figures],
        figures=figures,
    )


def _row(figure: dict[str, Any]) -> list[str]:
    passes = figure["passes_to_break_even"]
    return [
        pair_title(figure),
        str(figure["students"]),
        f"{figure['recorded_over_live']:.2f}",
        "never here" if passes is None else str(passes),
    ]
