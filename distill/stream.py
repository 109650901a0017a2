"""Provides the data of a run: batches of views, and the teachers' logits of these views.

Shape letters: B batch, R cells, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_service.datasets import open_dataset
from cache_service.format.canonical import canonical_json, sha256_hex
from cache_service.loading import STALLED_S, load_ahead
from cache_service.rows.reader import Cache
from distill.batches import Batch, BatchPlan, Cursor
from distill.config import TrainConfig
from distill.data import load_cache, recorded_seeds
from distill.methods import (
    MethodSettings,
    Requirements,
    TeacherFacts,
    ViewSelection,
    requirements_of,
)
from distill.on_device import DeviceViews, why_not_on_device
from distill.replay import Replay
from distill.targets import TargetDecoder

SCATTERED_OPEN_SHARDS = 64
"""Number of shards that stay mapped for random access. A shard has about five open files, and the
usual limit of a process is 1024."""


class StreamFacts(NamedTuple):
    """Facts about a stream that are known before data is read from it.

    Attributes:
        plan: assignment of positions to batches.
        teachers: facts about the teachers, in the order of `caches`.
        num_classes: number of classes of the dataset.
        view_size: side of the views, px.
        identity: JSON document that identifies the data. A run resumes only with an equal document.
        mixes: whether views are mixed from two samples.
        classes: class names by label; empty if the dataset has none.
        left_out: description of files beside the samples that were not taken; may be empty.
        loader: what makes the views, and why, for messages.
    """

    plan: BatchPlan
    teachers: tuple[TeacherFacts, ...]
    num_classes: int
    view_size: int
    identity: dict[str, Any]
    mixes: bool = False
    classes: tuple[str, ...] = ()
    left_out: str = ""
    loader: str = ""


class Stream(Protocol):
    """The batches of a run in a fixed order, and the teachers' logits."""

    @property
    def facts(self) -> StreamFacts:
        """Facts about the stream."""
        ...

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Iterate over the batches from a step on. They may be on any device."""
        ...

    def teacher_logits(self, batch: Batch, *, temperature: float, cache: int) -> Tensor:
        """Return a teacher's logits of a batch on the device, float32 [B, R, C]."""
        ...


class PlannedBatches:
    """Makes the batch of a step, with the other views that the methods require.

    Args:
        make: function that makes a batch of given positions of the cursor's seed. It must be
            picklable if worker processes call it.
        plan: assignment of positions to batches.
        selection: which positions and other views a step reads.
    """

    def __init__(
        self,
        make: Callable[[Cursor, NDArray[np.int64]], Batch],
        plan: BatchPlan,
        selection: ViewSelection,
    ) -> None:
        self._make = make
        self._plan = plan
        self._selection = selection

    def __call__(self, step: int) -> Batch:
        """Make the batch of a step."""
        cursor = self._plan.cursor(step)
        at = {"seed": cursor.seed, "epoch": cursor.epoch}
        positions_B = self._selection.positions(cursor.start, cursor.stop, **at)
        batch = self._make(cursor, positions_B)
        others = self._selection.other_views(positions_B, **at)
        return batch._replace(
            other_views={
                name: self._make(cursor._replace(seed=seed), positions)
                for name, (seed, positions) in others.items()
            }
        )


def train_loader(
    replay: Replay,
    plan: BatchPlan,
    *,
    requirements: Requirements | None = None,
    steps: Sequence[int] | None = None,
    workers: int = 0,
    pin_memory: bool = False,
    context: str = "forkserver",
) -> Iterator[Batch]:
    """Iterate over the batches of the plan, in order for any number of workers.

    Args:
        replay: dataset, recipe and caches.
        plan: assignment of positions to batches.
        requirements: requirements of the methods. They may add other views to each batch, or select
            the samples of an epoch.
        steps: steps whose batches are made; by default all steps of the plan.
        workers: number of loader processes; 0 makes the batches in this process.
        pin_memory: whether batches are copied to page-locked memory.
        context: how the loader processes are started.

    Raises:
        KdCacheError: reading or replaying failed, here or in a worker.
    """
    return load_ahead(
        PlannedBatches(replay.batch, plan, _select(replay, requirements, plan.seeds)),
        range(plan.num_steps) if steps is None else steps,
        workers=workers,
        pin_memory=pin_memory,
        context=context,
        # A worker that waits for rows to be recorded has not stalled.
        stalled_s=STALLED_S + max((cache.wait_s for cache in replay.caches), default=0.0),
    )


class LiveTeacher(NamedTuple):
    """A teacher that runs during training, for comparisons or if no logits are recorded.

    Attributes:
        facts: facts about the teacher.
        answer: function from uint8 views [B, H, W, 3] on the student's device to float32 logits
            [B, R, C].
    """

    facts: TeacherFacts
    answer: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ReplayedStream:
    """Views replayed from a recipe, with the rows of the caches that recorded it.

    Attributes:
        facts: facts that are known before data is read.
        replay: renders views and compares them with the recorded rows.
        decoders: for each cache, the decoder of its rows.
        workers: number of loader processes; ignored if `on_device` is not None.
        pin_memory: whether batches are copied to page-locked memory.
        requirements: requirements of the methods, such as other views.
        is_on_device: whether the batches are made on `device`.
        device: device of the students.
    """

    facts: StreamFacts
    replay: Replay
    decoders: tuple[TargetDecoder, ...]
    workers: int
    pin_memory: bool
    requirements: Requirements
    is_on_device: bool
    device: torch.device

    @cached_property
    def on_device(self) -> DeviceViews | None:
        """Makes the batches on the device of the students; None if workers make them."""
        if not self.is_on_device:
            return None
        num_seeds = self.requirements.seeds_per_epoch
        return DeviceViews(self.replay, self.device, num_seeds=num_seeds)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Iterate over the batches from a step on.

        Raises:
            SpecMismatchError, ViewDriftError: a view differs from the one that the teacher saw.
        """
        if self.on_device is not None:
            selection = _select(self.replay, self.requirements, self.facts.plan.seeds)
            return self.on_device.batches(self.facts.plan, selection, first_step)
        return train_loader(
            self.replay,
            self.facts.plan,
            requirements=self.requirements,
            steps=range(first_step, self.facts.plan.num_steps),
            workers=self.workers,
            pin_memory=self.pin_memory,
        )

    def teacher_logits(self, batch: Batch, *, temperature: float, cache: int) -> Tensor:
        """Decode recorded logits on the device."""
        return self.decoders[cache].logits(batch.rows[cache], temperature=temperature)


class LiveStream:
    """The views of another stream, with the logits of teachers that run now."""

    def __init__(self, views: Stream, live: Sequence[LiveTeacher]) -> None:
        teachers = tuple(teacher.facts for teacher in live)
        identity = {
            **views.facts.identity,
            "live_teachers": [list(facts.scales) for facts in teachers],
        }
        self.facts = views.facts._replace(teachers=teachers, identity=identity)
        self._views = views
        self._live = tuple(live)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Iterate over the batches of the other stream."""
        return self._views.batches(first_step)

    def teacher_logits(self, batch: Batch, *, temperature: float, cache: int) -> Tensor:  # noqa: ARG002 - Stream's signature
        """Run the teacher on the views of the batch."""
        return self._live[cache].answer(batch.images_BHW3)


def open_stream(
    config: TrainConfig,
    *,
    device: torch.device,
    seeds: Sequence[int] | None = None,
    methods: Sequence[MethodSettings] = (),
    rank: int = 0,
    world: int = 1,
) -> ReplayedStream:
    """Open the dataset and the caches of a train file and check that they match.

    Args:
        config: settings of the train file.
        device: device on which rows are decoded.
        seeds: seeds of a resumed run. They are used if the file names none, because the caches may
            contain more seeds than at the start of the run.
        methods: settings of the methods of all students. A method may require other views.
        rank: index of this process, which reads its slice of each batch.
        world: number of processes.

    Raises:
        DatasetError, NotACacheError, RowsNotBuiltError, SpecMismatchError: see the message.
        ConfigError: the requirements of the methods cannot be met, or contradict each other.
    """
    requirements = requirements_of(*methods)
    images = open_dataset(config.dataset)
    caches = _open_caches(config, scattered=bool(requirements.other_views))
    recipe = config.augment.recipe() if config.augment is not None else None
    replay = Replay(images, caches, recipe=recipe, max_drift=config.replay.max_drift)
    requested = config.seeds or (tuple(seeds) if seeds is not None else None)
    if caches:
        chosen = recorded_seeds(caches, requested)
    else:
        # Without caches every epoch has new views, also if a method compares two views of a sample.
        chosen = requested or tuple(range(config.epochs * requirements.seeds_per_epoch))
    selection = _select(replay, requirements, chosen)
    # `min_views` is 2 because batch norm cannot compute a variance from one view.
    sizes = selection.num_samples, config.batch_size
    plan = BatchPlan(*sizes, chosen, config.epochs, rank, world, min_views=2)
    why_not = why_not_on_device(
        replay,
        loader=config.loader,
        num_seeds=requirements.seeds_per_epoch,
        is_divided_on_cpu=world > 1 and device.type == "cpu",
    )
    return ReplayedStream(
        facts=_facts(replay, plan, selection)._replace(loader=_loader(config.workers, why_not)),
        replay=replay,
        decoders=tuple(
            TargetDecoder(cache.spec, cache.head(), device=str(device)) for cache in caches
        ),
        workers=config.workers,
        pin_memory=device.type == "cuda",
        requirements=requirements,
        is_on_device=not why_not,
        device=device,
    )


def _loader(workers: int, why_not: str) -> str:
    """Describe what makes the views."""
    if not why_not:
        return "the device"
    processes = f"loader processes (workers: {workers})" if workers else "this process"
    return f"{processes}, because {why_not}"


def _open_caches(config: TrainConfig, *, scattered: bool) -> list[Cache]:
    return [
        load_cache(
            cache.url,
            fingerprint=cache.fingerprint,
            wait_s=cache.wait_s,
            disk_cache=cache.disk_cache,
            disk_cache_bytes=cache.disk_cache_bytes,
            open_shards=SCATTERED_OPEN_SHARDS if scattered else None,
        )
        for cache in config.caches
    ]


def _select(
    replay: Replay, requirements: Requirements | None, seeds: Sequence[int]
) -> ViewSelection:
    return ViewSelection(
        requirements or Requirements(),
        labels_N=replay.images.labels,
        seeds=seeds,
        repeats=replay.views.recipe.repeats,
    )


def _facts(replay: Replay, plan: BatchPlan, selection: ViewSelection) -> StreamFacts:
    caches, recipe = replay.caches, replay.views.recipe
    return StreamFacts(
        plan=plan,
        teachers=tuple(recorded_facts(cache) for cache in caches),
        num_classes=replay.images.id.num_classes,
        view_size=recipe.size,
        identity={
            "dataset": replay.images.id.sha256,
            "recipe": sha256_hex(canonical_json(recipe.model_dump(mode="json"))),
            "caches": [cache.fingerprint for cache in caches],
            "seeds": list(plan.seeds),
        }
        | selection.identity,
        mixes=bool(recipe.mixing),
        left_out=replay.images.left_out,
        classes=replay.images.classes,
    )


def recorded_facts(cache: Cache) -> TeacherFacts:
    """Return facts about a cache's teacher, which are known without reading rows."""
    spec = cache.spec
    return TeacherFacts(
        scales=spec.scales,
        num_classes=spec.teacher.num_classes,
        pooling=spec.teacher.pooling,
        origin=cache.url,
        preprocess=spec.teacher.preprocess,
        drops_classes=spec.codec.drops_classes,
    )
