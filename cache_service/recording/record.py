"""Records shards: views are rendered, the teacher answers them, whole shards are committed.

Four things overlap: workers render the next views, the teacher answers, one thread encodes its
answers, and one writes the previous shard. Memory holds the batches that are rendered in advance
and two shards, whatever the size of the cache. A kill can cost one answered shard and what is
answered of the next one.
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
    teacher_batches,
)
from cache_service.rows.writer import CacheWriter, create_cache
from cache_service.storage import open_storage
from cache_service.views.identity import library_versions
from cache_service.views.replay import ViewBatch, Views

POLL_S = 0.5
"""How often to look whether another builder has finished the shards that it holds."""

AUTO_WORKERS_FROM = 50_000
"""Views below which starting worker processes (4 s each) costs more than they save."""


class RenderedBatch(NamedTuple):
    """The views of one job. `pixels` is a tensor because those travel through shared memory."""

    job: Job
    pixels_BHW3: torch.Tensor
    views: ViewBatch


class EncodedBatch(NamedTuple):
    """The rows of one job, and by position the views that are kept as witnesses."""

    rows: Arrays
    witnesses: dict[int, NDArray[np.uint8]]


class _Run(NamedTuple):
    """What accompanies a call of `record`."""

    meter: ProgressMeter
    stop: StopRequest
    order: ShardOrder


def open_writer(build: BuildContext) -> CacheWriter:
    """Open, make or extend the build's cache. Raises SpecMismatchError where another is there."""
    return create_cache(
        open_storage(build.config.cache),
        build.spec,
        num_seeds=max(build.config.seeds) + 1,
        versions=library_versions(),
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

    Another thread may use `order` meanwhile to have a shard recorded next.

    Returns:
        The number of shards that this call committed.

    Raises:
        OutOfSpaceError: the storage is full; what is committed stays good.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the shard being written is committed first.
        NonFiniteError: the teacher answered what the codec cannot hold; names the samples.
        UnreadableSampleError: a sample cannot be decoded; names it.
    """
    shards = part.select(all_shards(build.spec, seeds))
    pending = [shard for shard in shards if not writer.is_committed(*shard)]
    meter = ProgressMeter(build.spec, part=shards, pending=pending, on_progress=on_progress)
    order = order or ShardOrder()
    writer.storage.sweep()
    try:
        while pending:
            with stop_on_signal() as stop:
                run = _Run(meter, stop, order)
                with closing(_record_shards(build, writer, pending, run)) as committed:
                    for shard in committed:
                        meter.add_commit(shard)
            pending = [shard for shard in pending if not writer.is_committed(*shard)]
            if pending:  # another builder holds them: wait for it to commit, or to die
                time.sleep(POLL_S)
                meter.add_answers(0)  # shows that this builder is alive
    finally:
        writer.storage.sweep()
    return meter.shards_committed


def _record_shards(
    build: BuildContext, writer: CacheWriter, pending: list[Shard], run: _Run
) -> Generator[Shard]:
    """Yield each shard once it is committed; the next one is answered while it is written."""
    jobs = teacher_batches(build.spec, run.order.through(pending), build.config.batch_size)
    batches = load_ahead(_Render(build.views), jobs, workers=_num_workers(build, pending))
    written: Future[Shard | None] | None = None
    # One thread each, so that batches are encoded and shards committed in their order.
    encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
    committer = ThreadPoolExecutor(1, thread_name_prefix="writer")
    with encoder, committer:
        for shard, of_shard in groupby(batches, key=_shard_of):
            if writer.is_committed(*shard) or not writer.storage.begin(_lock_name(shard)):
                continue  # another builder has it
            try:
                encoded = [
                    encoder.submit(encode_batch, build, batch, answer)
                    for batch, answer in _answer_batches(build, of_shard, run)
                ]
                done = written.result() if written is not None else None
            except KeyboardInterrupt:
                writer.storage.end(_lock_name(shard))
                if written is not None and (done := written.result()) is not None:
                    yield done
                raise
            except BaseException:
                writer.storage.end(_lock_name(shard))
                raise
            written = committer.submit(_write, build.spec, writer, shard, encoded)
            if done is not None:
                yield done
        if written is not None and (done := written.result()) is not None:
            yield done


def _num_workers(build: BuildContext, pending: list[Shard]) -> int:
    if build.config.workers is not None:
        return build.config.workers
    views = len(pending) * build.spec.layout.shard_rows
    return 0 if views < AUTO_WORKERS_FROM else max(1, (os.cpu_count() or 2) - 1)


def _shard_of(batch: RenderedBatch) -> Shard:
    return Shard(batch.job.seed, batch.job.shard)


def _lock_name(shard: Shard) -> str:
    return f"{shard.seed}-{shard.shard}"


class _Render:
    """Renders the views of a job; sent to the rendering workers."""

    def __init__(self, views: Views) -> None:
        self._views = views

    def __call__(self, job: Job) -> RenderedBatch:
        batch = self._views.render(job.seed, np.arange(job.start, job.stop, dtype=np.int64))
        pixels = torch.from_numpy(batch.pixels_BHW3)
        # The array inside the views would travel a second time, by pickle.
        return RenderedBatch(job, pixels, batch._replace(pixels_BHW3=batch.pixels_BHW3[:0]))


def _answer_batches(
    build: BuildContext, batches: Iterable[RenderedBatch], run: _Run
) -> Iterator[tuple[RenderedBatch, Floats]]:
    for batch in batches:
        if run.stop.requested:
            # Raised here and not in the signal's handler, so that it cannot cut a clean-up short.
            raise KeyboardInterrupt
        answer = build.answer(batch.pixels_BHW3)
        run.meter.add_answers(len(answer))
        yield batch, answer


def encode_batch(build: BuildContext, batch: RenderedBatch, answer_BRX: Floats) -> EncodedBatch:
    """Encode the teacher's answers to one batch.

    Raises:
        NonFiniteError: the codec cannot hold an answer; names seed, positions and samples.
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
    positions = CacheLayout(build.spec).witness_positions(job.shard)
    here = positions[(positions >= job.start) & (positions < job.stop)].tolist()
    pixels = batch.pixels_BHW3.numpy()
    return EncodedBatch(common | encoded, {p: pixels[p - job.start].copy() for p in here})


def _write(
    spec: CacheSpec, writer: CacheWriter, shard: Shard, encoded: list[Future[EncodedBatch]]
) -> Shard | None:
    try:
        rows, witnesses = join_batches(spec, shard.shard, [batch.result() for batch in encoded])
        committed = writer.write_shard(*shard, rows, witnesses, library_versions())
    finally:
        writer.storage.end(_lock_name(shard))
    return shard if committed else None


def join_batches(
    spec: CacheSpec, shard: int, batches: Sequence[EncodedBatch]
) -> tuple[Arrays, NDArray[np.uint8]]:
    """Every row array of a shard, and its witnesses, uint8 [W, H, W, 3]."""
    names = batches[0].rows
    rows = {name: np.concatenate([batch.rows[name] for batch in batches]) for name in names}
    views = {position: view for batch in batches for position, view in batch.witnesses.items()}
    positions = CacheLayout(spec).witness_positions(shard).tolist()
    return rows, np.stack([views[position] for position in positions])
