"""What a run reads: batches of views, and the teachers' logits of them.

Shape letters: B batch, R cells, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_service.datasets import open_dataset
from cache_service.format.canonical import canonical_json, sha256_hex
from cache_service.loading import STALLED_S, load_ahead
from cache_service.rows.reader import DEFAULT_OPEN_SHARDS, Cache
from cache_service.views.draws import epoch_order
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
from distill.on_device import DeviceViews, open_on_device
from distill.replay import Replay
from distill.targets import TargetDecoder

SCATTERED_OPEN_SHARDS = 64
"""Shards kept mapped where rows are read from anywhere. Each holds some five files open, and a
process may open 1024."""


class StreamFacts(NamedTuple):
    """What is known of a stream before anything is read from it.

    Attributes:
        plan: which positions make which batch.
        teachers: in the order of `caches`.
        num_classes: of the dataset.
        view_size: side of the views, px.
        identity: what fixes the stream, as JSON; a run is only ever resumed on the same one.
        mixes: views are mixed of two samples.
        classes: class names by label; empty if the dataset has none.
    """

    plan: BatchPlan
    teachers: tuple[TeacherFacts, ...]
    num_classes: int
    view_size: int
    identity: dict[str, Any]
    mixes: bool = False
    classes: tuple[str, ...] = ()


class Stream(Protocol):
    """The batches of a run, in their one order."""

    @property
    def facts(self) -> StreamFacts:
        """What is known of it."""
        ...

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The batches from a step on, on any device."""
        ...

    def teacher_logits(self, batch: Batch, *, temperature: float, cache: int) -> Tensor:
        """A teacher's logits of a batch on the device, float32 [B, R, C]."""
        ...


class PlannedBatches:
    """Step -> Batch, with the other views that the methods of a run compare its views to.

    Args:
        make: the batch of some positions of a cursor's seed; picklable where workers call it.
        plan: which positions make which batch.
        labels_N: of the dataset.
        requirements: of the methods.
    """

    def __init__(
        self,
        make: Callable[[Cursor, NDArray[np.int64]], Batch],
        plan: BatchPlan,
        labels_N: NDArray[np.integer],
        requirements: Requirements,
    ) -> None:
        self._make = make
        self._plan = plan
        self._num_samples = len(labels_N)
        self._selection = ViewSelection(requirements, labels_N=labels_N, seeds=plan.seeds)

    def __call__(self, step: int) -> Batch:
        """The batch of a step."""
        cursor = self._plan.cursor(step)
        at = {"seed": cursor.seed, "epoch": cursor.epoch}
        positions_B = self._selection.positions(cursor.start, cursor.stop, **at)
        batch = self._make(cursor, positions_B)
        samples_B = epoch_order(self._num_samples, cursor.seed)[positions_B]
        others = self._selection.other_views(samples_B, **at)
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
    first_step: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    context: str = "forkserver",
) -> Iterator[Batch]:
    """The plan's batches from `first_step` on, in order, whatever the number of workers.

    `requirements` of methods add other views to each batch, or select the samples of an epoch.

    Raises:
        KdCacheError: from reading or replaying, also out of a worker.
    """
    return load_ahead(
        PlannedBatches(replay.batch, plan, replay.images.labels, requirements or Requirements()),
        range(first_step, plan.num_steps),
        workers=workers,
        pin_memory=pin_memory,
        context=context,
        # Waiting for rows that are being recorded is not a stall.
        stalled_s=STALLED_S + max((cache.wait_s for cache in replay.caches), default=0.0),
    )


class LiveTeacher(NamedTuple):
    """A teacher that runs beside the student: for comparisons, and where nothing is recorded.

    Attributes:
        facts: what is known of it.
        answer: uint8 views [B, H, W, 3] on the student's device -> float32 logits [B, R, C].
    """

    facts: TeacherFacts
    answer: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ReplayedStream:
    """Views replayed from a recipe, with the rows of the caches that recorded it.

    Attributes:
        facts: what is known before anything is read.
        replay: views and rows, compared with each other.
        decoders: of the rows of each cache.
        workers: loader processes; not used where `on_device` is there.
        pin_memory: hand batches over in page-locked memory.
        requirements: other views that come with each batch.
        loader: of the train file.
        device: where the students are.
    """

    facts: StreamFacts
    replay: Replay
    decoders: tuple[TargetDecoder, ...]
    workers: int
    pin_memory: bool
    requirements: Requirements
    loader: Literal["auto", "workers", "device"]
    device: torch.device

    @cached_property
    def on_device(self) -> DeviceViews | None:
        """What makes the batches on the device of the students; None where workers do."""
        num_seeds = self.requirements.seeds_per_epoch
        return open_on_device(self.replay, self.device, loader=self.loader, num_seeds=num_seeds)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The batches from a step on; refused where a view is not what the teacher saw."""
        if self.on_device is not None:
            labels_N, plan = self.replay.images.labels, self.facts.plan
            planned = PlannedBatches(self.on_device.batch, plan, labels_N, self.requirements)
            return map(planned, range(first_step, plan.num_steps))
        return train_loader(
            self.replay,
            self.facts.plan,
            requirements=self.requirements,
            first_step=first_step,
            workers=self.workers,
            pin_memory=self.pin_memory,
        )

    def teacher_logits(self, batch: Batch, *, temperature: float, cache: int) -> Tensor:
        """Recorded logits, decoded on the device."""
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
        """Of the views."""
        return self._views.batches(first_step)

    def teacher_logits(self, batch: Batch, *, temperature: float, cache: int) -> Tensor:  # noqa: ARG002 - Stream's signature
        """Run the teacher."""
        return self._live[cache].answer(batch.images_BHW3)


def open_stream(
    config: TrainConfig,
    *,
    device: torch.device,
    seeds: Sequence[int] | None = None,
    methods: Sequence[MethodSettings] = (),
) -> ReplayedStream:
    """Open dataset and caches of a train file and check that they belong together.

    Args:
        config: the train file.
        device: where rows are decoded.
        seeds: of a run that resumes; where the file names none, the caches may hold more by now.
        methods: of all students; some require other views beside each batch's own.

    Raises:
        DatasetError, NotACacheError, RowsNotBuiltError, SpecMismatchError: see the message.
        ConfigError: what the methods require cannot be provided, or not together.
    """
    requirements = requirements_of(*methods)
    images = open_dataset(config.dataset)
    caches = [
        load_cache(
            cache.url,
            fingerprint=cache.fingerprint,
            wait_s=cache.wait_s,
            disk_cache=cache.disk_cache,
            disk_cache_bytes=cache.disk_cache_bytes,
            open_shards=SCATTERED_OPEN_SHARDS if requirements.other_views else DEFAULT_OPEN_SHARDS,
        )
        for cache in config.caches
    ]
    recipe = config.augment.recipe() if config.augment is not None else None
    replay = Replay(images, caches, recipe=recipe, max_drift=config.replay.max_drift)
    wanted = config.seeds or (tuple(seeds) if seeds is not None else None)
    if caches:
        chosen = recorded_seeds(caches, wanted)
    else:
        # New views every epoch, and where two of a sample are compared, both are new.
        chosen = wanted or tuple(range(config.epochs * requirements.seeds_per_epoch))
    selection = ViewSelection(requirements, labels_N=images.labels, seeds=chosen)
    plan = BatchPlan(selection.num_samples, config.batch_size, chosen, config.epochs, min_views=2)
    stream = ReplayedStream(
        facts=_facts(replay, plan, selection),
        replay=replay,
        decoders=tuple(
            TargetDecoder(cache.spec, cache.head(), device=str(device)) for cache in caches
        ),
        workers=config.workers,
        pin_memory=device.type == "cuda",
        requirements=requirements,
        loader=config.loader,
        device=device,
    )
    if config.loader == "device":
        stream.on_device  # noqa: B018 - refused now rather than at the first batch
    return stream


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
        classes=replay.images.classes,
    )


def recorded_facts(cache: Cache) -> TeacherFacts:
    """What is known of a cache's teacher without reading a row."""
    spec = cache.spec
    return TeacherFacts(
        scales=spec.scales,
        num_classes=spec.teacher.num_classes,
        pooling=spec.teacher.pooling,
        origin=cache.url,
        preprocess=spec.teacher.preprocess,
        drops_classes=spec.codec.drops_classes,
    )
