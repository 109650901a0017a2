"""`bench memory`: the most memory that training takes, by where the teacher's logits come from.

Every variant trains in a process of its own. On a GPU the figure is what torch allocates there; on
a CPU it is the resident memory of the process above its start, libraries excluded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from cache_service.human_format import human_bytes
from cache_service.recording.build_config import BuildConfig
from cli.experiments.bench.page import BenchOptions, BenchPage, Figures, Goal
from cli.experiments.bench.pairs import Pair, pair_title, train_file
from cli.experiments.bench.step import record_batches
from cli.experiments.bench.variants import CACHE_KD, CACHE_SDD, Variant, variants_of
from cli.experiments.measure import MeasuringProcesses, VariantJob

GOALS = {CACHE_KD.title: 1.01, CACHE_SDD.title: 1.05}
"""Largest wanted ratio to the memory of the student alone."""


def measure_memory(pair: Pair, options: BenchOptions) -> Figures:
    """Measure every variant of one pair."""
    variants = variants_of(pair)
    peaks: dict[Variant, int] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        MeasuringProcesses(len(variants), threads=1) as processes,
    ):
        build = record_batches(pair, folder, options.device)
        for each in variants:
            options.on_message(f"{pair.name}: {each.title}")
            job = _job(pair, build, each, Path(folder))
            peaks[each] = processes.measure(job, lambda *_: None).peak_memory_bytes
    return [
        {
            "pair": pair.name,
            "size": pair.size,
            "batch_size": pair.batch_size,
            "variant": each.title,
            "peak_bytes": peaks[each],
            "of_labels_alone": peaks[each] / peaks[variants[0]],
        }
        for each in variants
    ]


def _job(pair: Pair, build: BuildConfig, variant: Variant, folder: Path) -> VariantJob:
    train = train_file(
        pair,
        build,
        method=variant.method,
        cached=variant.teacher == "cache",
        out=folder / variant.title.replace(" ", "-").replace(",", ""),
        # The device loader would add the same images and rows to every figure.
        loader="workers",
        workers=0,
        log_every=1,
    )
    return VariantJob(
        train=train,
        teacher=build.teacher if variant.teacher == "live" else None,
        scales=build.scales if variant.has_cells else (1,),
    )


def memory_page(figures: Figures, options: BenchOptions) -> BenchPage:
    """The page of the figures."""
    counted = (
        "Peak of what torch allocates on the device."
        if options.on_gpu
        else "Peak resident memory above the start of the run."
    )
    return BenchPage(
        name="memory",
        title="Memory of training, by where the teacher's logits come from",
        notes=[
            (
                f"{counted} Each variant trains for one short epoch in a process of its own. One "
                "run, no spread."
            ),
            options.arithmetic,
        ],
        header=("teacher -> student", "px", "batch", "variant", "peak", "of labels alone"),
        rows=[
            [
                pair_title(figure),
                str(figure["size"]),
                str(figure["batch_size"]),
                figure["variant"],
                human_bytes(figure["peak_bytes"]),
                f"{figure['of_labels_alone']:.3f}",
            ]
            for figure in figures
        ],
        figures=figures,
        goals=[
            Goal(
                f"{pair_title(figure)}, {figure['size']} px, {figure['variant']}: "
                "memory / labels alone",
                GOALS[figure["variant"]],
                figure["of_labels_alone"],
            )
            for figure in figures
            if figure["variant"] in GOALS
        ],
    )
