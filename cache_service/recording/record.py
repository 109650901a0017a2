"""Records shards: renders views, runs the teacher, encodes its logits and commits whole shards.

Four stages overlap: worker processes render the next views, the teacher computes logits, one thread
encodes them, and one thread writes the previous shard. Memory holds the prefetched batches and two
shards, independent of the size of the cache. If the process is killed, the work on up to two shards
is lost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cache_service.errors import NonFiniteError
from cache_service.format.codecs import Arrays, Floats
from cache_service.format.layout import CacheLayout
from cache_service.format.spec import CacheSpec
from cache_service.interrupts import StopRequest, stop_on_signal
from cache_service.loading import load_ahead
from cache_service.recording.context import BuildContext
from cache_service.recording.shards import (
    WHOLE,
    Job,
    OnProgress,
    Part,
    ProgressMeter,
    Shard,
    ShardOrder,
    all_shards,
    not_recorded,
    teacher_batches,
)
from cache_service.rows.writer import CacheWriter, create_cache
from cache_service.storage import open_storage
from cache_service.views.identity import library_versions
from cache_service.views.replay import ViewBatch, Views

POLL_S = 0.5
"""Interval between checks whether another process has finished its shards, seconds."""

AUTO_WORKERS_FROM = 50_000
"""Smallest number of views for which worker processes are started. A start takes 4 s."""


class RenderedBatch(NamedTuple):
    """The views of one job. Pixels are a tensor, which is transferred through shared memory."""

    job: Job
    pixels_BHW3: torch.Tensor
    views: ViewBatch


class EncodedBatch(NamedTuple):
    """The rows of one job, and the views to store as witnesses, by position."""

    rows: Arrays
    witnesses: dict[int, NDArray[np.uint8]]


class _Writing(NamedTuple):
    """A shard that is being written, and whether this builder commits it."""

    shard: Shard
    committed: Future[bool]


class _Run(NamedTuple):
    """Objects that the functions of one call of `record` share.

    Attributes:
        meter: counts.
        stop: whether to stop.
        order: of the shards.
        taken: shards that other builders have reserved.
    """

    meter: ProgressMeter
    stop: StopRequest
    order: ShardOrder
    taken: list[Shard]


def open_writer(build: BuildContext) -> CacheWriter:
    """Open, create or extend the cache of a build.

    Raises:
        SpecMismatchError: the path holds a cache with another spec.
    """
    return create_cache(
        open_storage(build.config.cache),
        build.spec,
        num_seeds=max(build.config.seeds) + 1,
        versions=library_versions(build.spec.recipe),
        provenance=build.provenance,
        head=build.head,
    )


def record(
    build: BuildContext,
    writer: CacheWriter,
    *,
    seeds: tuple[int, ...],
    part: Part = WHOLE,
    on_progress: OnProgress = lambda _: None,
    order: ShardOrder | None = None,
) -> int:
    """Record the shards of these seeds that are not recorded yet.

    During the call, another thread may use `order` to prioritize a shard.

    Returns:
        The number of shards that this call committed.

    Raises:
        OutOfSpaceError: the storage is full. Committed shards stay valid.
        KeyboardInterrupt: Ctrl-C or SIGTERM was received. A shard that is being written is
            committed first.
        NonFiniteError: the codec cannot represent logits of the teacher. The message names the
            samples.
        UnreadableSampleError: a sample cannot be decoded. The message names it.
    """
    shards = part.select(all_shards(build.spec, seeds))
    pending = not_recorded(writer.storage, build.spec, shards)
    meter = ProgressMeter(build.spec, part=shards, pending=pending, on_progress=on_progress)
    order = order or ShardOrder()
    if not writer.storage.has_locks:
        order.scatter()
    writer.storage.sweep()
    try:
        while pending:
            pending = _record_once(build, writer, pending, meter, order)
    finally:
        writer.storage.sweep()
    return meter.shards_committed


def record_handed_out(
    build: BuildContext,
    writer: CacheWriter,
    order: ShardOrder,
    expected: list[Shard],
    *,
    on_progress: OnProgress,
) -> None:
    """Record the shards that an order hands out, and await those that other builders have reserved.

    Args:
        build: the opened build.
        writer: its cache.
        order: hands out shards.
        expected: shards that may be handed out, for the number of renderers and the progress.
        on_progress: called as `record` does. It may raise KeyboardInterrupt.

    Raises:
        KeyboardInterrupt, KdCacheError: see `record`.
    """
    meter = ProgressMeter(build.spec, part=expected, pending=expected, on_progress=on_progress)
    pending = _record_once(build, writer, expected, meter, order)
    while pending:
        pending = _record_once(build, writer, pending, meter, ShardOrder())


def _record_once(
    build: BuildContext,
    writer: CacheWriter,
    pending: list[Shard],
    meter: ProgressMeter,
    order: ShardOrder,
) -> list[Shard]:
    """Record the shards that no other builder has reserved. Returns those that are left.

    If any are left, it pauses, so that the other builders may commit them or die.
    """
    with stop_on_signal() as stop:
        run = _Run(meter, stop, order, [])
        with closing(_record_shards(build, writer, pending, run)) as committed:
            for shard in committed:
                meter.add_commit(shard)
    left = list(_uncommitted(writer, run.taken, run))
    if left:
        time.sleep(POLL_S)
        meter.add_answers(0)  # reports that this process is alive
    return left


def _record_shards(
    build: BuildContext, writer: CacheWriter, pending: list[Shard], run: _Run
) -> Generator[Shard]:
    """Yield each shard after its commit. The teacher runs on the next shard during a write."""
    shards = _uncommitted(writer, run.order.through(pending), run)
    jobs = teacher_batches(build.spec, shards, build.config.batch_size)
    batches = load_ahead(Renderer(build.views), jobs, workers=num_workers(build, pending))
    written: _Writing | None = None
    # One thread per stage, so that batches are encoded and shards are committed in order.
    encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
    committer = ThreadPoolExecutor(1, thread_name_prefix="writer")
    with encoder, committer:
        for shard, of_shard in groupby(batches, key=_shard_of):
            if writer.is_committed(*shard):  # while it was rendered
                run.meter.add_found(shard)
                continue
            if not writer.storage.begin(_lock_name(shard)):
                run.taken.append(shard)
                continue
            if not writer.storage.has_locks:  # of a folder, known from the first reservation on
                run.order.scatter()
            try:
                encoded = [
                    encoder.submit(encode_batch, build, batch, answer)
                    for batch, answer in _answer_batches(build, of_shard, run)
                ]
                done = _await(written, run)
            except KeyboardInterrupt:
                writer.storage.end(_lock_name(shard))
                if (done := _await(written, run)) is not None:
                    yield done
                raise
            except BaseException:
                writer.storage.end(_lock_name(shard))
                raise
            written = _Writing(shard, committer.submit(_write, build.spec, writer, shard, encoded))
            if done is not None:
                yield done
        if (done := _await(written, run)) is not None:
            yield done


def _uncommitted(writer: CacheWriter, shards: Iterable[Shard], run: _Run) -> Iterator[Shard]:
    """The shards that are not committed when they are taken. The others are counted."""
    for shard in shards:
        if run.stop.requested:  # there may be many that others have committed
            raise KeyboardInterrupt
        if writer.is_committed(*shard):
            run.meter.add_found(shard)
        else:
            yield shard


def _await(written: _Writing | None, run: _Run) -> Shard | None:
    """Wait until a shard is committed; None if another builder was first."""
    if written is None:
        return None
    if written.committed.result():
        return written.shard
    # Both builders had reserved it, so reservations do not exclude anybody here: each may have its
    # own mount of the folder.
    run.order.scatter()
    run.meter.add_found(written.shard, answered=True)
    return None


def num_workers(build: BuildContext, pending: list[Shard]) -> int:
    """Rendering processes of a recording."""
    if build.config.workers is not None:
        return build.config.workers
    views = len(pending) * build.spec.layout.shard_rows
    return 0 if views < AUTO_WORKERS_FROM else max(1, (os.cpu_count() or 2) - 1)


def _shard_of(batch: RenderedBatch) -> Shard:
    return Shard(batch.job.seed, batch.job.shard)


def _lock_name(shard: Shard) -> str:
    return f"{shard.seed}-{shard.shard}"


class Renderer:
    """Renders the views of a job. It is pickled and sent to the rendering processes."""

    def __init__(self, views: Views) -> None:
        self._views = views

    def __call__(self, job: Job) -> RenderedBatch:
        """Render the views of a job."""
        batch = self._views.render(job.seed, np.arange(job.start, job.stop, dtype=np.int64))
        pixels = torch.from_numpy(batch.pixels_BHW3)
        # Without the empty slice, pickle would transfer the pixels a second time.
        return RenderedBatch(job, pixels, batch._replace(pixels_BHW3=batch.pixels_BHW3[:0]))


def _answer_batches(
    build: BuildContext, batches: Iterable[RenderedBatch], run: _Run
) -> Iterator[tuple[RenderedBatch, Floats]]:
    for batch in batches:
        if run.stop.requested:
            # Raised here instead of in the signal handler, where it could interrupt a clean-up.
            raise KeyboardInterrupt
        answer = build.answer(batch.pixels_BHW3)
        run.meter.add_answers(len(answer))
        yield batch, answer


def encode_batch(build: BuildContext, batch: RenderedBatch, answer_BRX: Floats) -> EncodedBatch:
    """Encode the teacher's logits of one batch.

    Raises:
        NonFiniteError: the codec cannot represent a value. The message names the seed, the
            positions and the samples.
    """
    job, views, labels = batch.job, batch.views, build.dataset.labels
    labels_B2 = np.stack([labels[views.samples_B], labels[views.partners_B]], axis=1)
    try:
        encoded = build.spec.codec.encode(answer_BRX, labels_B2)
    except NonFiniteError as problem:
        raise NonFiniteError(
            f"{problem.message} They are of the batch at seed {job.seed}, positions "
            f"[{job.start}, {job.stop}), samples {views.samples_B[:8].tolist()} and on.",
            hint="Try teacher.precision: float32, and check the checkpoint.",
        ) from problem
    common: Arrays = {
        "sample": views.samples_B.astype(np.int32),
        "digest": views.digests_B,
        "origin": views.origins_B,
    }
    # Copies of the witnesses, because a slice would keep the pixels of the whole batch in memory.
    positions = CacheLayout(build.spec).witness_positions(job.shard)
    here = positions[(positions >= job.start) & (positions < job.stop)].tolist()
    pixels = batch.pixels_BHW3.numpy()
    return EncodedBatch(common | encoded, {p: pixels[p - job.start].copy() for p in here})


def _write(
    spec: CacheSpec, writer: CacheWriter, shard: Shard, encoded: list[Future[EncodedBatch]]
) -> bool:
    try:
        rows, witnesses = join_batches(spec, shard.shard, [batch.result() for batch in encoded])
        versions = library_versions(spec.recipe)
        return writer.write_shard(*shard, rows, witnesses, versions)
    finally:
        writer.storage.end(_lock_name(shard))


def join_batches(
    spec: CacheSpec, shard: int, batches: Sequence[EncodedBatch]
) -> tuple[Arrays, NDArray[np.uint8]]:
    """Concatenate the row arrays of a shard and stack its witnesses, uint8 [N, H, W, 3]."""
    names = batches[0].rows
    rows = {name: np.concatenate([batch.rows[name] for batch in batches]) for name in names}
    views = {position: view for batch in batches for position, view in batch.witnesses.items()}
    positions = CacheLayout(spec).witness_positions(shard).tolist()
    return rows, np.stack([views[position] for position in positions])
