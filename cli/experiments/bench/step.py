"""`bench step`: a student's step on labels alone, from a cache and with a live teacher.

The variants take turns, so that other load on the machine affects all of them. A ratio is the
median of the rounds' ratios. Large views are rendered before, so that a slow loader cannot hide
what a teacher costs; small ones are made on the device by the loader that training uses.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from cache_service.recording.build_config import BuildConfig
from cache_service.recording.context import open_build
from cache_service.recording.engines import prepare, run_local
from cli.experiments.bench.loops import HELD_BATCHES, StepLoop
from cli.experiments.bench.page import BenchOptions, BenchPage, Figures, Goal, spread
from cli.experiments.bench.pairs import Pair, build_file, pair_title
from cli.experiments.bench.variants import FROM_CACHE, LABELS, Variant, variants_of

GOAL = 1.02
"""Largest wanted ratio of a step from the cache to a step on labels alone."""

FEW_VIEWS = 2_000
"""Fewer large views than this are rendered in one process; to start others takes longer."""


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
        rounds: turns of the variants.
        steps: of one turn.
        warm_up: steps before the first turn.
    """

    rounds: int
    steps: int
    warm_up: int


SMALL = Sizes(rounds=9, steps=40, warm_up=20)
LARGE = Sizes(rounds=7, steps=15, warm_up=10)
ON_CPU = Sizes(rounds=5, steps=4, warm_up=2)
QUICK = Sizes(rounds=2, steps=4, warm_up=2)


def measure_step(pair: Pair, options: BenchOptions) -> Figures:
    """Measure the steps of one pair."""
    sizes = QUICK if options.quick else _sizes_for(pair, options)
    with tempfile.TemporaryDirectory() as folder:
        options.on_message(f"{pair.name}: recording {HELD_BATCHES} batches")
        build = record_batches(pair, folder, options.device)
        options.on_message(f"{pair.name}: {sizes.rounds} rounds of {sizes.steps} steps")
        return _measure(pair, build, Path(folder), sizes)


def _sizes_for(pair: Pair, options: BenchOptions) -> Sizes:
    if not options.on_gpu:
        return ON_CPU
    return SMALL if pair.is_small else LARGE


def record_batches(pair: Pair, folder: str, device: str) -> BuildConfig:
    """Record one seed of a few of the student's batches, and return the build file."""
    samples = pair.batch_size * HELD_BATCHES
    build = build_file(pair, folder, device=device, num_samples=samples)
    if samples < FEW_VIEWS:
        build = build.model_copy(update={"workers": 0})
    opened = open_build(build)
    prepare(opened)
    run_local(opened, seeds=(0,))
    return build


def _measure(pair: Pair, build: BuildConfig, folder: Path, sizes: Sizes) -> Figures:
    variants = variants_of(pair)
    loops = {each: StepLoop(pair, build, each, folder, held=not pair.is_small) for each in variants}
    for loop in loops.values():
        loop.run(sizes.warm_up)
    seconds: dict[Variant, list[float]] = {each: [] for each in variants}
    for number in range(sizes.rounds):
        # A different variant begins each round, so that none always follows the same one.
        first = number % len(variants)
        for each in variants[first:] + variants[:first]:
            seconds[each].append(loops[each].run(sizes.steps) / sizes.steps)
    del loops, loop
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [
        {
            "pair": pair.name,
            "batch_size": pair.batch_size,
            "loader": "on the device" if pair.is_small else "rendered before",
            "variant": each.title,
            "views_per_s": pair.batch_size / statistics.median(seconds[each]),
            "seconds_per_step": seconds[each],
            "ratios": [
                own / base for own, base in zip(seconds[each], seconds[LABELS], strict=True)
            ],
        }
        for each in variants
    ]


def step_page(figures: Figures, options: BenchOptions) -> BenchPage:
    """The page of the figures."""
    return BenchPage(
        name="step",
        title="Time of a training step, by where the teacher's logits come from",
        notes=[
            (
                "Medians over rounds in which the variants take turns, with the least and the "
                "largest ratio."
            ),
            (
                f"Small views are made on the device. Of large ones {HELD_BATCHES} batches are "
                "rendered before and trained on in turn, copied to the device at every step."
            ),
            options.arithmetic,
        ],
        header=("teacher -> student", "batch", "views", "variant", "views/s", "time / labels"),
        rows=[
            [
                pair_title(figure),
                str(figure["batch_size"]),
                figure["loader"],
                figure["variant"],
                f"{figure['views_per_s']:,.0f}",
                spread(figure["ratios"]),
            ]
            for figure in figures
        ],
        figures=figures,
        goals=[
            Goal(
                f"{pair_title(figure)}, {figure['variant']}: time of a step / labels alone",
                GOAL,
                statistics.median(figure["ratios"]),
            )
            for figure in figures
            if figure["variant"] in FROM_CACHE
        ],
    )
