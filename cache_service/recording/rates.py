"""What recording costs on this machine: each stage of a build measured, and the rate of them all.

Stages overlap as in `cache_service.recording.record`: rendering processes, the teacher, one thread
that encodes, and one that writes. Without rendering processes, rendering and teacher take turns.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cache_service.errors import StorageError
from cache_service.format.layout import CacheLayout
from cache_service.format.shard import pack
from cache_service.recording.context import BuildContext, resolve_device
from cache_service.storage import Storage, local_path, open_storage
from cache_service.views.replay import ViewBatch

T = TypeVar("T")

MEASURED_VIEWS = 32
"""Views that are compressed to estimate the size of the stored ones."""

MEASURED_S = 1.0
"""A stage is repeated for so long, at most MAX_BATCHES times; its median counts."""

MAX_BATCHES = 5
WRITTEN_BYTES = 8 << 20
"""The large object of a measurement of the storage. A shard has up to 64 MiB of them."""

SMALL_BYTES = 1 << 10
NUM_SMALL = 3
"""Small objects of that measurement: like commits, they cost what any object costs."""


class ViewCost(NamedTuple):
    """Seconds of one view in each stage, measured.

    Attributes:
        render_s: in one rendering process.
        answer_s: of the teacher on its device.
        encode_s: in the thread that encodes.
        write_s: in the thread that writes; 0.0 if the storage was not measured.
        view_bytes: bytes of a stored view.
        device_bytes: largest number of bytes allocated on a CUDA device, with the weights; None on
            another device.
    """

    render_s: float
    answer_s: float
    encode_s: float
    write_s: float
    view_bytes: float
    device_bytes: int | None


class Machine(NamedTuple):
    """What the processes of a build share.

    Attributes:
        cores: CPU cores that this process may use.
        gpus: GPUs that the processes of a build are spread over; 0 if the teacher runs on the CPU.
        threads: CPU threads of the teacher.
    """

    cores: int
    gpus: int
    threads: int

    @classmethod
    def of(cls, build: BuildContext) -> Machine:
        """This machine, for a build."""
        on_gpu = resolve_device(build.config.device).startswith("cuda")
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        gpus = torch.cuda.device_count() if build.config.processes > 1 else 1
        return cls(len(cores) or os.cpu_count() or 1, gpus * on_gpu, torch.get_num_threads())


class StorageCost(NamedTuple):
    """Seconds that an object costs whatever its size, and a byte."""

    object_s: float
    byte_s: float


def recording_rate(
    cost: ViewCost, machine: Machine, *, workers: int, processes: int = 1
) -> tuple[float, str]:
    """Views per second of a recording, and the stage that limits it.

    Args:
        cost: of a view.
        machine: where it runs.
        workers: rendering processes of each process with a teacher.
        processes: processes with a teacher.
    """
    on_cpu_s = cost.render_s + cost.encode_s
    if not machine.gpus:
        on_cpu_s += machine.threads * cost.answer_s
    # Seconds of a view in each part of the machine. The parts work at the same time.
    parts = {
        "rendering": cost.render_s / max(workers, 1) / processes,
        "teacher": cost.answer_s / min(processes, machine.gpus or processes),
        "encoding": cost.encode_s / processes,
        "storage": cost.write_s,
        "CPU cores": on_cpu_s / machine.cores,
    }
    if workers == 0:
        parts["rendering and teacher in turn"] = (cost.render_s + cost.answer_s) / processes
    slowest = max(parts, key=lambda part: parts[part])
    return 1 / parts[slowest], slowest


def workers_for(cost: ViewCost) -> int:
    """Rendering processes that hide rendering behind the slowest other stage."""
    return max(1, math.ceil(cost.render_s / max(cost.answer_s, cost.encode_s, cost.write_s)))


def measure_views(build: BuildContext, *, storage: StorageCost | None = None) -> ViewCost:
    """Render, answer and encode a few batches of the first seed.

    Args:
        build: the opened build.
        storage: from `measure_storage`.
    """
    seed, num_samples = build.config.seeds[0], len(build.dataset)
    count = min(build.config.batch_size, num_samples)

    def render(batch: int) -> ViewBatch:
        start = batch * count % (num_samples - count + 1)
        return build.views.render(seed, np.arange(start, start + count, dtype=np.int64))

    build.views.render(seed, np.arange(1))  # opens files
    render_s, views = _timed(render)
    pixels = torch.from_numpy(views.pixels_BHW3)
    labels = build.dataset.labels[views.samples_B][:, None]
    build.answer(pixels[:1])  # initializes the device outside of the measurement
    device = torch.device(resolve_device(build.config.device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    answer_s, answer = _timed(lambda _: build.answer(pixels))
    encode_s, _ = _timed(lambda _: build.spec.codec.encode(answer, labels))
    return ViewCost(
        render_s / count,
        answer_s / count,
        encode_s / count,
        0.0 if storage is None else _write_seconds(CacheLayout(build.spec), storage),
        _stored_bytes(build, views.pixels_BHW3),
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def measure_storage(url: str) -> StorageCost:
    """Write a large and a few small objects where a cache will be, and remove them.

    In a folder, they are written durably into a folder of their own, beside the cache's first file
    or in the nearest folder above that exists. Nothing else is written.

    Raises:
        StorageError, OutOfSpaceError: the place cannot be written.
    """
    with _place_to_write(url) as storage:
        small = [_write_seconds_of(storage, SMALL_BYTES) for _ in range(NUM_SMALL)]
        object_s = statistics.median(small)
        large_s = _write_seconds_of(storage, WRITTEN_BYTES)
    return StorageCost(object_s, max(large_s - object_s, 0.0) / WRITTEN_BYTES)


def _write_seconds_of(storage: Storage, num_bytes: int) -> float:
    key = f"plan-{uuid.uuid4().hex}"
    content = os.urandom(num_bytes)
    started = time.perf_counter()
    try:
        storage.put(key, content)
        return time.perf_counter() - started
    finally:
        storage.delete(key)


@contextmanager
def _place_to_write(url: str) -> Iterator[Storage]:
    path = local_path(url)
    if path is None:
        yield open_storage(url)
        return
    folders = [Path(path).absolute(), *Path(path).absolute().parents]
    nearest = next(folder for folder in folders if folder.is_dir())
    try:
        folder = tempfile.mkdtemp(prefix=".kd-cache-plan-", dir=nearest)
    except OSError as problem:
        raise StorageError(f"cannot write into {nearest}: {problem.strerror}.") from problem
    try:
        yield open_storage(folder)
    finally:
        shutil.rmtree(folder)


def _write_seconds(layout: CacheLayout, storage: StorageCost) -> float:
    """Seconds of one row of a whole shard in the thread that writes."""
    objects = len(layout.arrays) + 2  # and the stored views, and the commit
    return objects * storage.object_s / layout.spec.layout.shard_rows + (
        layout.row_bytes * storage.byte_s
    )


def _timed(step: Callable[[int], T]) -> tuple[float, T]:
    """Median seconds of a few calls, and the last result."""
    times: list[float] = []
    while True:
        started = time.perf_counter()
        result = step(len(times))
        times.append(time.perf_counter() - started)
        if len(times) == MAX_BATCHES or sum(times) > MEASURED_S:
            return statistics.median(times), result


def _stored_bytes(build: BuildContext, views_BHW3: NDArray[np.uint8]) -> float:
    """Bytes of a stored view: some are compressed together, as those of a shard are."""
    together = CacheLayout(build.spec).witness_shape[0]
    starts = range(0, min(MEASURED_VIEWS, len(views_BHW3)), together)
    packs = [views_BHW3[start : start + together] for start in starts]
    return sum(len(pack(each.tobytes())) for each in packs) / sum(map(len, packs))
