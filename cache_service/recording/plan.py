"""Estimates rows, bytes and time of a build before it is run, and checks its teacher."""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass

import numpy as np

from cache_service.format.commit import Commit, encode_commit
from cache_service.format.group import ROOT_KEY
from cache_service.format.layout import CacheLayout
from cache_service.format.seeds import describe_seeds
from cache_service.format.shard import ChunkTable
from cache_service.format.spec import CacheSpec, DatasetId
from cache_service.human_format import human_seconds
from cache_service.recording.comparison import check_teacher
from cache_service.recording.context import BuildContext
from cache_service.recording.rates import (
    Machine,
    measure_storage,
    measure_views,
    recording_rate,
    workers_for,
)
from cache_service.recording.record import num_workers
from cache_service.recording.shards import all_shards, not_recorded, num_rows
from cache_service.remote.prefetch import Span, aligned_spans, rows_per_request
from cache_service.storage import Storage, open_storage
from cache_service.teacher.class_order import OtherOrder
from cache_service.teacher.normalization import OtherNormalization
from cache_service.views.identity import library_versions

MAX_SHARD_S = 120.0
"""Longest time of a shard without a warning. A kill costs up to two shards."""


@dataclass(frozen=True)
class BuildPlan:
    """The estimated cost of a build, and the score of its teacher.

    Attributes:
        rows: number of views of all seeds.
        rows_pending: number of views that are not recorded yet.
        bytes_per_row: bytes of a row, uncompressed.
        bytes_total: bytes of all objects of the shards, and of a stored head. Rows are counted
            uncompressed; the size of the stored views is estimated from a few.
        is_compressed: whether rows are compressed: then `bytes_total` is what they take at most.
        objects: number of these objects.
        render_rows_per_s: measured rate of rendering in one process, views per second.
        teacher_rows_per_s: measured rate of the teacher on its device, views per second.
        encode_rows_per_s: measured rate of the thread that encodes answers.
        write_rows_per_s: of the thread that writes, from a few objects that were written where the
            cache will be, and removed. None if nothing is pending, and nothing was written.
        processes: processes with a teacher.
        workers: rendering processes that each of them starts; 0 for none.
        busy_workers: rendering processes that would hide rendering behind the slowest other stage.
        limit: the stage that is slowest.
        wall_s: time for the pending rows, without the start, seconds. The stages overlap, but
            rendering and teacher take turns where there are no rendering processes.
        kill_s: longest work that a kill of the build loses, seconds.
        memory_bytes: largest resident memory of this process, with dataset and teacher.
        device_bytes: largest memory allocated on the CUDA device at the batch size of the build,
            with the weights; None on another device.
        bucket_requests: requests of an epoch that is read from a bucket, once per computer; every
            further process reads the commits again.
        server_requests: requests of an epoch that is read from a server with `disk_cache`. Without
            it there is one a batch.
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
    is_compressed: bool
    objects: int
    stored_scales: tuple[int, ...]
    render_rows_per_s: float
    teacher_rows_per_s: float
    encode_rows_per_s: float
    write_rows_per_s: float | None
    processes: int
    workers: int
    busy_workers: int
    limit: str
    wall_s: float
    kill_s: float
    memory_bytes: int
    device_bytes: int | None
    bucket_requests: int
    server_requests: int
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
    """Check and score the teacher, count rows, and measure every stage of the build.

    Nothing that it writes stays: see `measure_storage`.

    Raises:
        StorageError, OutOfSpaceError: the place of the cache cannot be written.
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
    cost = measure_views(build, storage=measure_storage(config.cache) if pending else None)
    workers = num_workers(build, pending)
    machine, layout = Machine.of(build), CacheLayout(spec)
    rate, limit = recording_rate(cost, machine, workers=workers, processes=config.processes)
    return BuildPlan(
        cache=config.cache,
        fingerprint=spec.fingerprint,
        seeds=describe_seeds(config.seeds),
        rows=len(config.seeds) * spec.dataset.num_samples,
        rows_pending=rows_pending,
        shards=len(shards),
        shard_rows=spec.layout.shard_rows,
        bytes_per_row=layout.row_bytes,
        bytes_total=len(config.seeds) * seed_bytes(layout, cost.view_bytes) + head_bytes(layout),
        is_compressed=spec.codec.compression != "none",
        objects=num_objects(layout, len(shards)),
        stored_scales=spec.stored_scales,
        render_rows_per_s=1 / cost.render_s,
        teacher_rows_per_s=1 / cost.answer_s,
        encode_rows_per_s=1 / cost.encode_s,
        write_rows_per_s=1 / cost.write_s if cost.write_s else None,
        processes=config.processes,
        workers=workers,
        busy_workers=workers_for(cost),
        limit=limit,
        wall_s=rows_pending / rate,
        kill_s=min(2 * config.processes * spec.layout.shard_rows, rows_pending) / rate,
        memory_bytes=_largest_memory(),
        device_bytes=cost.device_bytes,
        bucket_requests=bucket_requests(layout),
        server_requests=server_requests(layout),
        accuracy=score.accuracy,
        chance=score.chance,
        scored_samples=score.num_samples,
        class_order=_describe_order(score.other_order),
        normalization=_describe_normalization(score.other_normalization),
        teacher_weights=build.teacher.weights_from,
        reuse=describe_reuse(len(config.seeds), spec.recipe.repeats),
        dataset=_describe_dataset(spec.dataset),
        left_out=build.dataset.left_out,
        long_shards=_advice_on_shards(storage, spec, rate / config.processes),
    )


def _advice_on_shards(storage: Storage, spec: CacheSpec, rate: float) -> str:
    """As `describe_long_shards`; the layout of a cache that is there cannot be changed."""
    return "" if storage.get(ROOT_KEY) is not None else describe_long_shards(spec, rate)


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


def _describe_dataset(dataset: DatasetId) -> str:
    size = f"{dataset.num_samples:,} samples of {dataset.num_classes:,} classes"
    return f"{dataset.name} ({dataset.split}): {size}"


def _describe_normalization(other: OtherNormalization | None) -> str:
    if other is None:
        return ""
    counts = f"{other.right_now} of {other.num_views} samples are right"
    return f"{counts}, {other.description}: {other.hint}"


def _largest_memory() -> int:
    """Bytes of this process in memory at its peak."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bucket_requests(layout: CacheLayout) -> int:
    """Requests of an epoch from a bucket: each object of rows and each commit once."""
    return layout.spec.num_shards * (len(layout.arrays) + 1)


def server_requests(layout: CacheLayout) -> int:
    """Requests of an epoch from a server: pieces of shards, as large as a request may be."""
    step = rows_per_request(layout.arrays)
    shards = (Span(0, *layout.spec.shard_range(n), ()) for n in range(layout.spec.num_shards))
    return sum(len(aligned_spans(span, step, layout.spec)) for span in shards)


def seed_bytes(layout: CacheLayout, view_bytes: float) -> int:
    """Bytes of the objects of one seed, with commits.

    Args:
        layout: of the cache.
        view_bytes: of a stored view.
    """
    shards = range(layout.spec.num_shards)
    rows = sum(layout.row_object_bytes(shard) for shard in shards)
    others = layout.witness_shape[0] * view_bytes + commit_bytes(layout)
    return rows + round(len(shards) * others)


def num_objects(layout: CacheLayout, num_shards: int) -> int:
    """Of so many shards, with the stored views and the commits, and of a head."""
    return num_shards * (len(layout.arrays) + 2) + len(layout.heads)


def head_bytes(layout: CacheLayout) -> int:
    """Bytes of the constant arrays of a cache, float32 with a checksum each."""
    return sum(4 * math.prod(shape) + 4 for shape in layout.heads.values())


def commit_bytes(layout: CacheLayout) -> int:
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
