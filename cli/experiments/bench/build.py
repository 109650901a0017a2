"""`bench build`: recorded rows per second, beside the slowest of what a recording consists of.

A recording cannot be faster than the teacher alone, the rendering of the views alone, or the disk.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cache_service.format.layout import CacheLayout
from cache_service.human_format import human_bytes
from cache_service.loading import load_ahead
from cache_service.recording.context import BuildContext, open_build
from cache_service.recording.engines import prepare, run_local
from cache_service.recording.record import Renderer
from cache_service.recording.shards import Progress, all_shards, teacher_batches
from cli.experiments.bench.page import BenchOptions, BenchPage, Figures, Goal
from cli.experiments.bench.pairs import Pair, build_file

GOAL = 0.95
"""Smallest wanted fraction of the slowest part."""

WARM_UP = 3
"""Teacher batches before it is timed."""


class Sizes(NamedTuple):
    """How much is measured: teacher batches of a seed, seeds, and batches of a timing."""

    batches: int
    seeds: int
    timed: int


FULL = Sizes(batches=24, seeds=2, timed=20)
ON_CPU = Sizes(batches=12, seeds=2, timed=8)
QUICK = Sizes(batches=3, seeds=2, timed=2)


def measure_build(pair: Pair, options: BenchOptions) -> Figures:
    """Measure the teacher of one pair."""
    sizes = QUICK if options.quick else (FULL if options.on_gpu else ON_CPU)
    options.on_message(f"{pair.teacher}: recording {sizes.seeds} seeds")
    with tempfile.TemporaryDirectory() as folder:
        batch_size = build_file(pair, folder, device=options.device, num_samples=2).batch_size
        config = build_file(
            pair,
            folder,
            device=options.device,
            num_samples=sizes.batches * batch_size,
            seeds=sizes.seeds,
        )
        build = open_build(config)
        prepare(build)
        teacher = [_teacher_rate(build, sizes)]
        views = _views_rate(build, config.seeds)
        recorded = recording_rate(build, config.seeds)
        teacher.append(_teacher_rate(build, sizes))
        disk = _disk_rate(build, folder)
    row_bytes = CacheLayout(build.spec).row_bytes
    rates = {"teacher": statistics.mean(teacher), "views": views, "disk": disk / row_bytes}
    slowest = min(rates, key=lambda name: rates[name])
    return [
        {
            "teacher": pair.teacher,
            "size": pair.size,
            "cells": build.spec.num_cells,
            "workers": config.workers,
            "row_bytes": row_bytes,
            "rows_per_s": rates,
            "recorded_per_s": recorded,
            "slowest": slowest,
            "of_slowest": recorded / rates[slowest],
        }
    ]


def _teacher_rate(build: BuildContext, sizes: Sizes) -> float:
    size = build.spec.recipe.size
    rng = np.random.default_rng(0)
    shape = (build.config.batch_size, size, size, 3)
    views_BHW3 = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    for _ in range(WARM_UP):
        build.answer(views_BHW3)
    seconds = _timed(lambda: [build.answer(views_BHW3) for _ in range(sizes.timed)])
    return sizes.timed * len(views_BHW3) / seconds


def _views_rate(build: BuildContext, seeds: tuple[int, ...]) -> float:
    """Views per second from the first batch on: the start of the processes is left out."""
    jobs = teacher_batches(build.spec, all_shards(build.spec, seeds), build.config.batch_size)
    batches = load_ahead(Renderer(build.views), list(jobs), workers=build.config.workers or 0)
    next(batches)
    began = time.perf_counter()
    rendered = sum(len(each.pixels_BHW3) for each in batches)
    return rendered / (time.perf_counter() - began)


def recording_rate(build: BuildContext, seeds: tuple[int, ...]) -> float:
    """Rows per second from the first answered batch to the commit of the last shard."""
    first: list[float] = []

    def note(_: Progress) -> None:
        if not first:
            first.append(time.perf_counter())

    run_local(build, seeds=seeds, on_progress=note)
    seconds = time.perf_counter() - first[0]
    return (len(seeds) * build.spec.dataset.num_samples - build.config.batch_size) / seconds


def _disk_rate(build: BuildContext, folder: str) -> float:
    """Bytes per second of writing and syncing as many bytes as a shard has."""
    rows = min(build.spec.layout.shard_rows, build.spec.dataset.num_samples)
    payload = os.urandom(CacheLayout(build.spec).row_bytes * rows)
    path = Path(folder, "disk")

    def write() -> None:
        with path.open("wb") as file:
            file.write(payload)
            os.fsync(file.fileno())

    return len(payload) / _timed(write)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def build_page(figures: Figures, options: BenchOptions) -> BenchPage:
    """The page of the figures."""
    return BenchPage(
        name="build",
        title="Speed of a recording, and of its parts",
        notes=[
            (
                "Rows per second. Teacher: the network on views that are in memory, its logits "
                "copied to the host. Views: decoded, augmented and digested by the loader "
                "processes. Disk: a shard's bytes, written and synced. Start-up is left out of "
                "all of them. One run, no spread."
            ),
            options.arithmetic,
        ],
        header=("teacher", "px", "cells", "row", "teacher", "views", "disk", "recorded", "ratio"),
        rows=[
            [
                figure["teacher"],
                str(figure["size"]),
                str(figure["cells"]),
                human_bytes(figure["row_bytes"]),
                *(f"{figure['rows_per_s'][name]:,.0f}" for name in ("teacher", "views", "disk")),
                f"{figure['recorded_per_s']:,.0f}",
                f"{figure['of_slowest']:.2f} of {figure['slowest']}",
            ]
            for figure in figures
        ],
        figures=figures,
        goals=[
            Goal(
                f"{figure['teacher']}, {figure['size']} px: recorded rows / the slowest part, "
                f"{figure['slowest']}",
                GOAL,
                figure["of_slowest"],
                at_least=True,
            )
            for figure in figures
        ],
    )
