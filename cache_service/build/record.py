"""Record shards: views in, one teacher pass each, whole committed shards out.

Three things overlap: workers render ahead, the teacher answers, and one thread encodes and writes
the shard before. Memory holds the batches rendered ahead and two shards, whatever the cache's size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.build.jobs import WHOLE, Job, Part, Shard, all_shards, my_shards, teacher_batches
from cache_service.build.opened import OpenedBuild
from cache_service.build.progress import Meter, OnProgress
from cache_service.build.render import Rendered, rendered
from cache_service.errors import NonFiniteError
from cache_service.format.codecs import Arrays, encode
from cache_service.format.layout import witness_positions
from cache_service.format.spec import CacheSpec
from cache_service.interrupts import StopRequest, stop_on_signal
from cache_service.storage import open_storage
from cache_service.views.versions import library_versions
from cache_service.writer import CacheWriter, create_cache

POLL_S = 0.5
"""How often to look whether another builder has finished the shards that it holds."""

AUTO_WORKERS_FROM = 50_000
"""Views below which starting worker processes (4 s each) costs more than they save."""


class _Watch(NamedTuple):
    """Who is told, and who may ask to stop, between two teacher batches."""

    meter: Meter
    stop: StopRequest


def open_writer(build: OpenedBuild) -> CacheWriter:
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
    build: OpenedBuild,
    writer: CacheWriter,
    *,
    seeds: tuple[int, ...],
    part: Part = WHOLE,
    on_progress: OnProgress = lambda _: None,
) -> int:
    """Record the shards of these seeds that are not recorded yet.

    Returns:
        The number of shards that this call committed.

    Raises:
        OutOfSpaceError: the storage is full; what is committed stays good.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the shard being written is committed first.
        NonFiniteError: the teacher answered what the codec cannot hold; names the samples.
        UnreadableSampleError: a sample cannot be decoded; names it.
    """
    mine = my_shards(all_shards(build.spec, seeds), part)
    todo = [shard for shard in mine if not writer.is_committed(*shard)]
    meter = Meter(build.spec, mine=mine, todo=todo, listener=on_progress)
    writer.storage.sweep()
    try:
        while todo:
            with stop_on_signal() as stop:
                watch = _Watch(meter, stop)
                with closing(_recorded(build, writer, todo, watch)) as made:
                    for shard in made:
                        meter.committed(shard)
            todo = [shard for shard in todo if not writer.is_committed(*shard)]
            if todo:  # another builder holds them: wait for it to commit, or to die
                time.sleep(POLL_S)
                meter.answered(0)  # a sign of life
    finally:
        writer.storage.sweep()
    return meter.committed_here


def _recorded(
    build: OpenedBuild, writer: CacheWriter, todo: list[Shard], watch: _Watch
) -> Generator[Shard]:
    """Yield each shard once it is committed; the next one is answered while it is written."""
    jobs = list(teacher_batches(build.spec, todo, build.config.batch_size))
    stream = rendered(build.views, jobs, workers=_num_workers(build, jobs))
    pending: Future[Shard | None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as pool:
        for key, batches in groupby(stream, key=_shard_of):
            if writer.is_committed(*key) or not writer.storage.begin(_name(key)):
                continue  # another builder has it
            try:
                encoded = list(_encoded(build, batches, watch))
                done = pending.result() if pending is not None else None
            except BaseException:
                writer.storage.end(_name(key))
                raise
            pending = pool.submit(_write, build.spec, writer, key, encoded)
            if done is not None:
                yield done
        if pending is not None and (done := pending.result()) is not None:
            yield done


def _shard_of(batch: Rendered) -> Shard:
    return Shard(batch.job.seed, batch.job.shard)


def _name(key: Shard) -> str:
    return f"{key.seed}-{key.shard}"


class _Batch(NamedTuple):
    """The encoded rows of one job, and by position the views that are kept as witnesses."""

    rows: Arrays
    witnesses: dict[int, NDArray[np.uint8]]


def _encoded(build: OpenedBuild, batches: Iterator[Rendered], watch: _Watch) -> Iterator[_Batch]:
    for batch in batches:
        if watch.stop.requested:
            # Raised here and not in the signal's handler, so that it cannot cut a clean-up short.
            raise KeyboardInterrupt
        answer = build.answer(batch.pixels_BHW3)
        views, labels = batch.views, build.dataset.labels
        kept = np.stack([labels[views.samples_B], labels[views.partners_B]], axis=1)
        try:
            encoded = encode(build.spec.codec, answer, kept)
        except NonFiniteError as problem:
            samples = f"{views.samples_B[:8].tolist()} and on"
            raise NonFiniteError(
                f"{problem.message} They are of the batch at seed {batch.job.seed}, positions "
                f"[{batch.job.start}, {batch.job.stop}), samples {samples}.",
                hint="Try teacher.precision: float32, and check the checkpoint.",
            ) from problem
        common: Arrays = {
            "sample": views.samples_B.astype(np.int32),
            "digest": views.digests_B,
            "origin": views.origins_B,
        }
        wanted = witness_positions(build.spec, batch.job.shard)
        here = wanted[(wanted >= batch.job.start) & (wanted < batch.job.stop)]
        pixels = batch.pixels_BHW3.numpy()
        watch.meter.answered(len(pixels))
        yield _Batch(common | encoded, {int(p): pixels[p - batch.job.start].copy() for p in here})


def _write(spec: CacheSpec, writer: CacheWriter, key: Shard, batches: list[_Batch]) -> Shard | None:
    try:
        names = batches[0].rows
        rows = {name: np.concatenate([batch.rows[name] for batch in batches]) for name in names}
        kept = {position: view for batch in batches for position, view in batch.witnesses.items()}
        witnesses = np.stack([kept[int(p)] for p in witness_positions(spec, key.shard)])
        committed = writer.write_shard(*key, rows, witnesses, library_versions())
    finally:
        writer.storage.end(_name(key))
    return key if committed else None


def _num_workers(build: OpenedBuild, jobs: list[Job]) -> int:
    if build.config.workers is not None:
        return build.config.workers
    views = sum(job.stop - job.start for job in jobs)
    return 0 if views < AUTO_WORKERS_FROM else max(1, (os.cpu_count() or 2) - 1)
