"""Estimates rows, bytes and time of a build before it is run, and checks its teacher."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cache_service.format.commit import Commit, encode_commit
from cache_service.format.group import ROOT_KEY
from cache_service.format.layout import CacheLayout
from cache_service.format.seeds import describe_seeds
from cache_service.format.shard import ChunkTable, pack
from cache_service.format.spec import CacheSpec
from cache_service.human_format import human_seconds
from cache_service.recording.comparison import check_teacher
from cache_service.recording.context import BuildContext
from cache_service.recording.record import num_workers
from cache_service.recording.shards import all_shards, not_recorded, num_rows
from cache_service.storage import open_storage
from cache_service.teacher.class_order import OtherOrder
from cache_service.teacher.normalization import OtherNormalization
from cache_service.views.identity import library_versions

MAX_SHARD_S = 120.0
"""Longest time of a shard without a warning. A kill costs up to two shards."""

MEASURED_VIEWS = 32
"""Views that are compressed to estimate the size of the stored ones."""


@dataclass(frozen=True)
class BuildPlan:
    """The estimated cost of a build, and the score of its teacher.

    Attributes:
        rows: number of views of all seeds.
        rows_pending: number of views that are not recorded yet.
        bytes_per_row: bytes of a row, uncompressed.
        bytes_total: bytes of all objects of the shards. Rows are counted uncompressed; the size of
            the stored views is estimated from a few.
        objects: number of these objects.
        render_rows_per_s: measured rate of rendering in one process, views per second.
        teacher_rows_per_s: measured rate of the teacher on its device, views per second.
        workers: rendering processes that the build starts; 0 for none.
        wall_s: time for the pending rows, without the start, seconds. Rendering and teacher overlap
            where there are rendering processes, and take turns where there are none.
        kill_s: longest work that a kill of the build loses, seconds.
        accuracy, chance: the teacher's accuracy on unaugmented samples, and that of guessing.
        class_order: probable order of the teacher's classes; empty if it is the dataset's.
        normalization: one under which the teacher knows the labels better; empty if there is none.
        teacher_weights: description of the loaded weights.
        reuse: how far the seeds go, in a sentence.
        dataset: what the dataset holds.
        left_out: files beside its samples that were not taken; may be empty.
        long_shards: how long a shard of a new cache takes and what to type, if that is more than
            MAX_SHARD_S; else empty.
    """

    cache: str
    fingerprint: str
    seeds: str
    rows: int
    rows_pending: int
    shards: int
    shard_rows: int
    bytes_per_row: int
    bytes_total: int
    objects: int
    stored_scales: tuple[int, ...]
    render_rows_per_s: float
    teacher_rows_per_s: float
    workers: int
    wall_s: float
    kill_s: float
    accuracy: float
    chance: float
    scored_samples: int
    teacher_weights: str
    reuse: str
    class_order: str = ""
    normalization: str = ""
    dataset: str = ""
    left_out: str = ""
    long_shards: str = ""


def make_plan(build: BuildContext) -> BuildPlan:
    """Check and score the teacher, count rows and measure one batch. Writes nothing.

    Raises:
        UnsupportedError: the teacher returns different logits for the same views.
        SpecMismatchError: the path holds a cache with another spec or of another teacher.
    """
    check_teacher(build)
    spec, config = build.spec, build.config
    shards = all_shards(spec, config.seeds)
    storage = open_storage(config.cache)
    pending = not_recorded(storage, spec, shards)
    rows_pending = num_rows(spec, pending)
    score = build.score()
    render_rate, teacher_rate, view_bytes = measure_rates(build)
    workers = num_workers(build, pending)
    rate = recording_rate(render_rate, teacher_rate, workers=workers, cores=available_cores())
    layout = CacheLayout(spec)
    return BuildPlan(
        cache=config.cache,
        fingerprint=spec.fingerprint,
        seeds=describe_seeds(config.seeds),
        rows=len(config.seeds) * spec.dataset.num_samples,
        rows_pending=rows_pending,
        shards=len(shards),
        shard_rows=spec.layout.shard_rows,
        bytes_per_row=layout.row_bytes,
        bytes_total=len(config.seeds) * _seed_bytes(layout, view_bytes),
        objects=len(shards) * (len(layout.arrays) + 2),  # and the stored views, and the commit
        stored_scales=spec.stored_scales,
        render_rows_per_s=render_rate,
        teacher_rows_per_s=teacher_rate,
        workers=workers,
        wall_s=rows_pending / rate,
        kill_s=min(2 * spec.layout.shard_rows, rows_pending) / rate,
        accuracy=score.accuracy,
        chance=score.chance,
        scored_samples=score.num_samples,
        class_order=_describe_order(score.other_order),
        normalization=_describe_normalization(score.other_normalization),
        teacher_weights=build.teacher.weights_from,
        reuse=describe_reuse(len(config.seeds), spec.recipe.repeats),
        dataset=f"{build.dataset.id.name} ({build.dataset.id.split}): "
        f"{build.dataset.id.num_samples:,} samples of {build.dataset.id.num_classes:,} classes",
        left_out=build.dataset.left_out,
        # The layout of a cache that is there cannot be changed.
        long_shards="" if storage.get(ROOT_KEY) is not None else describe_long_shards(spec, rate),
    )


def describe_long_shards(spec: CacheSpec, rate: float) -> str:
    """What to type if a shard takes longer than MAX_SHARD_S; else nothing.

    Args:
        spec: of a cache that is not there yet.
        rate: of the recording, views per second.
    """
    start, stop = spec.shard_range(0)
    seconds = (stop - start) / rate
    # A shard of one pair takes what it takes.
    if seconds <= MAX_SHARD_S or spec.layout.shard_rows == 2:
        return ""
    shard_rows = 1 << max(int(MAX_SHARD_S * rate).bit_length() - 1, 1)
    chunk_rows = math.gcd(spec.layout.chunk_rows, shard_rows)
    return (
        f"one takes {human_seconds(seconds)}, and a kill costs up to two. For shorter ones add "
        f"--set layout.shard_rows={shard_rows} --set layout.chunk_rows={chunk_rows} to plan and "
        "build"
    )


def describe_reuse(num_seeds: int, repeats: int) -> str:
    """How many epochs the seeds are good for, from `docs/results/seeds-cifar100.md`.

    Args:
        num_seeds: seeds to record.
        repeats: of the recipe.
    """
    epochs = "1 epoch" if num_seeds == 1 else f"{num_seeds} epochs"
    sentences = [f"{epochs} of new views; a longer run reads them again in other batches"]
    if repeats == 1:
        sentences.append("5 seeds were as good as 32 in a run of 32 short epochs")
    elif num_seeds < repeats:
        sentences.append(
            f"with augment.repeats={repeats} they visit {num_seeds} of {repeats} parts of the "
            f"images: record {repeats} seeds or a multiple"
        )
    elif num_seeds % repeats:
        sentences.append(
            f"with augment.repeats={repeats} some images are visited once more than others: "
            f"record a multiple of {repeats} seeds"
        )
    return "; ".join(sentences)


def _describe_normalization(other: OtherNormalization | None) -> str:
    if other is None:
        return ""
    counts = f"{other.right_now} of {other.num_views} samples are right"
    return f"{counts}, {other.description}: {other.hint}"


def _view_bytes(build: BuildContext, views_BHW3: NDArray[np.uint8]) -> float:
    """Bytes of a stored view: some are compressed together, as those of a shard are."""
    together = CacheLayout(build.spec).witness_shape[0]
    starts = range(0, min(MEASURED_VIEWS, len(views_BHW3)), together)
    packs = [views_BHW3[start : start + together] for start in starts]
    return sum(len(pack(each.tobytes())) for each in packs) / sum(map(len, packs))


def recording_rate(render: float, teacher: float, *, workers: int, cores: int) -> float:
    """Views per second of a recording.

    Args:
        render: views per second of one rendering process.
        teacher: views per second of the teacher, with encoding.
        workers: rendering processes.
        cores: CPU cores; more processes than these render no faster.
    """
    if workers == 0:
        return 1 / (1 / render + 1 / teacher)
    return min(render * min(workers, cores), teacher)


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _seed_bytes(layout: CacheLayout, view_bytes: float) -> int:
    """Bytes of the objects of one seed, with commits."""
    shards = range(layout.spec.num_shards)
    rows = sum(layout.row_object_bytes(shard) for shard in shards)
    others = layout.witness_shape[0] * view_bytes + _commit_bytes(layout)
    return rows + round(len(shards) * others)


def _commit_bytes(layout: CacheLayout) -> int:
    """Length of the commit of a whole shard; checksums are taken as numbers of 10 digits."""
    ten_digits = 2**31
    table = ChunkTable(
        layout.spec.layout.chunk_rows * layout.row_bytes * layout.num_chunks,
        ten_digits,
        np.full(layout.num_chunks, layout.spec.layout.chunk_rows * layout.row_bytes, np.int64),
        np.full(layout.num_chunks, ten_digits, np.uint32),
    )
    one = ChunkTable(ten_digits, 0, table.sizes[:1], table.checksums[:1])
    tables = {array.name: table for array in layout.arrays} | {"witness": one}
    commit = Commit(layout.spec.fingerprint, 0, 0, tables, library_versions())
    return len(encode_commit(commit))


def _describe_order(other: OtherOrder | None) -> str:
    if other is None:
        return ""
    return f"{other.description}, {other.accuracy:.1%} right. {other.hint}"


def measure_rates(build: BuildContext) -> tuple[float, float, float]:
    """Measure rendering in one process, and the teacher with encoding, in views per second; and the
    bytes of a stored view."""
    count = min(build.config.batch_size, len(build.dataset))
    positions = np.arange(count, dtype=np.int64)
    build.views.render(build.config.seeds[0], positions[:1])  # opens files
    started = time.perf_counter()
    views = build.views.render(build.config.seeds[0], positions)
    render_s = time.perf_counter() - started
    pixels = torch.from_numpy(views.pixels_BHW3)
    labels = build.dataset.labels[views.samples_B][:, None]
    build.answer(pixels[:1])  # initializes the device outside of the measurement
    started = time.perf_counter()
    build.spec.codec.encode(build.answer(pixels), labels)
    teacher_s = time.perf_counter() - started
    return count / render_s, count / teacher_s, _view_bytes(build, views.pixels_BHW3)
