"""Record shards: views in, one teacher pass each, whole committed shards out.

Four things overlap: workers render ahead, the teacher answers, one thread encodes what it answered,
and one writes the shard before. Memory holds the batches rendered ahead and two shards, whatever
the cache's size. A kill can cost one answered shard and what is answered of the next.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby
from typing import NamedTuple

from cache_service.format.codecs import Floats
from cache_service.format.spec import CacheSpec
from cache_service.interrupts import StopRequest, stop_on_signal
from cache_service.recording.encoding import EncodedBatch, encode_batch, join_batches
from cache_service.recording.jobs import WHOLE, Part, Shard, all_shards, my_shards, teacher_batches
from cache_service.recording.opened import OpenedBuild
from cache_service.recording.order import ShardOrder
from cache_service.recording.progress import Meter, OnProgress
from cache_service.recording.render import Rendered, rendered
from cache_service.rows.writer import CacheWriter, create_cache
from cache_service.storage import open_storage
from cache_service.views.identity import library_versions

POLL_S = 0.5
"""How often to look whether another builder has finished the shards that it holds."""

AUTO_WORKERS_FROM = 50_000
"""Views below which starting worker processes (4 s each) costs more than they save."""


class _Watch(NamedTuple):
    """Who is told, who may ask to stop, and who says which shard is next."""

    meter: Meter
    stop: StopRequest
    order: ShardOrder


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
    order: ShardOrder | None = None,
) -> int:
    """Record the shards of these seeds that are not recorded yet.

    `order` may be told meanwhile, from another thread, which shard to record next.

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
    order = order or ShardOrder()
    writer.storage.sweep()
    try:
        while todo:
            with stop_on_signal() as stop:
                watch = _Watch(meter, stop, order)
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
    jobs = teacher_batches(build.spec, watch.order.through(todo), build.config.batch_size)
    stream = rendered(build.views, jobs, workers=_num_workers(build, todo))
    pending: Future[Shard | None] | None = None
    with _pool("encoder") as encoder, _pool("writer") as pool:
        for key, batches in groupby(stream, key=_shard_of):
            if writer.is_committed(*key) or not writer.storage.begin(_name(key)):
                continue  # another builder has it
            try:
                encoded = [
                    encoder.submit(encode_batch, build, batch, answer)
                    for batch, answer in _answered(build, batches, watch)
                ]
                done = pending.result() if pending is not None else None
            except KeyboardInterrupt:
                writer.storage.end(_name(key))
                if pending is not None and (done := pending.result()) is not None:
                    yield done
                raise
            except BaseException:
                writer.storage.end(_name(key))
                raise
            pending = pool.submit(_write, build.spec, writer, key, encoded)
            if done is not None:
                yield done
        if pending is not None and (done := pending.result()) is not None:
            yield done


def _pool(name: str) -> ThreadPoolExecutor:
    # One thread each, so that batches are encoded and shards committed in their order.
    return ThreadPoolExecutor(1, thread_name_prefix=name)


def _shard_of(batch: Rendered) -> Shard:
    return Shard(batch.job.seed, batch.job.shard)


def _name(key: Shard) -> str:
    return f"{key.seed}-{key.shard}"


def _answered(
    build: OpenedBuild, batches: Iterator[Rendered], watch: _Watch
) -> Iterator[tuple[Rendered, Floats]]:
    for batch in batches:
        if watch.stop.requested:
            # Raised here and not in the signal's handler, so that it cannot cut a clean-up short.
            raise KeyboardInterrupt
        answer = build.answer(batch.pixels_BHW3)
        watch.meter.answered(len(answer))
        yield batch, answer


def _write(
    spec: CacheSpec, writer: CacheWriter, key: Shard, encoded: list[Future[EncodedBatch]]
) -> Shard | None:
    try:
        rows, witnesses = join_batches(spec, key.shard, [batch.result() for batch in encoded])
        committed = writer.write_shard(*key, rows, witnesses, library_versions())
    finally:
        writer.storage.end(_name(key))
    return key if committed else None


def _num_workers(build: OpenedBuild, todo: list[Shard]) -> int:
    if build.config.workers is not None:
        return build.config.workers
    views = len(todo) * build.spec.layout.shard_rows
    return 0 if views < AUTO_WORKERS_FROM else max(1, (os.cpu_count() or 2) - 1)
