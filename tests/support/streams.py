"""A stream in memory, small students by name, and train settings over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cache_service.format.cells import num_cells
from cache_service.format.spec import Preprocess
from distill.batches import Batch, BatchPlan, Cursor
from distill.config import TrainConfig
from distill.methods import TeacherFacts
from distill.methods.requirements import SameClassPair, SecondView
from distill.reporting import Event
from distill.stream import StreamFacts
from distill.trainer import train
from support.toys import NUM_CLASSES, TinyNet

SIDE = 8


class MemoryStream:
    """Random views and teachers' answers, fixed by (seed, position). Nothing is stored."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        num_samples: int = 22,
        scales: tuple[int, ...] = (1, 2),
        mixed: bool = False,
        num_teachers: int = 1,
        pooling: str = "direct",
        seeds: tuple[int, ...] = (0, 1),
    ) -> None:
        self.mixed = mixed
        self.seen = Preprocess(size=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3)
        teacher = TeacherFacts(scales, NUM_CLASSES, pooling, "memory", self.seen)
        self.facts = StreamFacts(
            plan=BatchPlan(num_samples, config.batch_size, seeds, config.epochs),
            teachers=(teacher,) * num_teachers,
            num_classes=NUM_CLASSES,
            view_size=SIDE,
            identity={"dataset": "memory", "caches": ["f" * 64], "seeds": list(seeds)},
        )

    def batches(self, first_step: int) -> Iterator[Batch]:
        for step in range(first_step, self.facts.plan.num_steps):
            torch.rand(3)  # as DataLoader does: drawing here must not move the loss curve
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        cursor = self.facts.plan.cursor(step)
        own = list(range(cursor.start, cursor.stop))
        other = cursor._replace(seed=cursor.seed + 100)
        # Pairs for the methods that compare them; any will do.
        pair = [(place + 1) % self.facts.plan.num_samples for place in own]
        others = {
            SecondView.name: self._views(other, own),
            SameClassPair.name: self._views(cursor, pair),
        }
        return self._views(cursor, own)._replace(other_views=others)

    def _views(self, cursor: Cursor, here: list[int]) -> Batch:
        count, size = self.facts.plan.num_samples, len(self.facts.teachers)
        drawn = torch.Generator().manual_seed(cursor.seed)
        images = torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=drawn, dtype=torch.uint8)
        labels = torch.randint(0, NUM_CLASSES, (count,), generator=drawn)
        partners = torch.randint(0, NUM_CLASSES, (count,), generator=drawn)
        weights = torch.rand(count, generator=drawn) if self.mixed else torch.ones(count)
        cells = num_cells(self.facts.teachers[0].scales) if size else 0
        logits = 3 * torch.randn(max(size, 1), count, cells, NUM_CLASSES, generator=drawn)
        return Batch(
            images_BHW3=images[here],
            labels_B=labels[here],
            partner_labels_B=(partners if self.mixed else labels)[here],
            weights_B=weights[here],
            samples_B=torch.arange(count)[here],
            rows=tuple({"logits": logits[cache, here]} for cache in range(size)),
            cursor=cursor,
        )

    def teacher_logits(self, batch: Batch, *, temperature: float, cache: int) -> Tensor:
        return batch.rows[cache]["logits"]


class PlainNet(nn.Module):
    """No norm and no dropout: an update depends on the views alone, however they are batched."""

    def __init__(self, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, num_classes)

    def forward_features(self, images_B3HW: Tensor) -> Tensor:
        return self.conv(images_B3HW).tanh()

    def forward_head(self, map_BDHW: Tensor) -> Tensor:
        return self.head(self.drop(map_BDHW.mean(dim=(2, 3))))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images_B3HW))


def plain_net(num_classes: int = NUM_CLASSES, dropout: float = 0.0) -> PlainNet:
    return PlainNet(num_classes, dropout)


def normed_net(num_classes: int = NUM_CLASSES) -> TinyNet:
    return TinyNet(num_classes, width=8)


def train_document(out: str, /, **changes: Any) -> dict[str, Any]:
    """A train file over `MemoryStream`; `student__model="..."` changes a nested key."""
    document: dict[str, Any] = {
        "dataset": {"name": "support.toys:patches"},
        "caches": ["nowhere"],
        "student": {"model": "support.streams:plain_net"},
        "method": {"name": "kd"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "epochs": 2,
        "batch_size": 4,
        "workers": 0,
        "device": "cpu",
        "log_every": 1,
        "out": out,
    }
    for path, value in changes.items():
        here = document
        *parents, last = path.split("__")
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = value
    return document


def train_config(out: Any, /, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(train_document(str(out), **changes))


def train_toys(out: Any, cache: Any, listen: Callable[[Event], None] | None = None) -> None:
    """Train a student on the toys from their recording: its URL, or what else `caches` accepts."""
    toys = {"name": "support.toys:patches", "args": {"num_samples": 96}}
    train(
        train_config(out, dataset=toys, caches=cache, batch_size=16, loader="workers"),
        on_event=listen,
    )
