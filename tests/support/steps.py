"""One step of a method on a batch in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cache_service.models.preprocess import prepare_views
from distill.methods import METHODS, MethodSettings, PeerLogits, Step, method_of
from distill.methods.base import Memory, Remembered
from support.streams import MemoryStream, train_config
from support.toys import NUM_CLASSES


def memory(*, mixed: bool = False, num_teachers: int = 1, **changes: Any) -> MemoryStream:
    """Batches of 8, under teachers who say random things."""
    config = train_config("unused", batch_size=8)
    return MemoryStream(config, mixed=mixed, num_teachers=num_teachers, **changes)


def images_of(stream: MemoryStream) -> Tensor:
    return prepare_views(stream.batch(0).images_BHW3, stream.seen, device="cpu")


REQUIRED: dict[str, dict[str, Any]] = {"specialist": {"classes": (1, 3)}}
"""Settings that have no default."""


def settings_of(name: str, **values: Any) -> MethodSettings:
    return METHODS[name].settings(**REQUIRED.get(name, {}) | values)


class Diary:
    """A student's own answers, in memory."""

    def __init__(self) -> None:
        self.said: dict[tuple[int, int], Tensor] = {}

    def remember(self, epoch: int, samples_B: Tensor, logits_BC: Tensor) -> None:
        for sample, row_C in zip(samples_B.tolist(), logits_BC, strict=True):
            self.said[epoch, sample] = row_C.clone()

    def recall(self, epoch: int, samples_B: Tensor) -> Remembered:
        rows = [self.said.get((epoch, sample)) for sample in samples_B.tolist()]
        blank = torch.zeros(NUM_CLASSES)
        known_B = torch.tensor([row is not None for row in rows])
        return Remembered(torch.stack([blank if row is None else row for row in rows]), known_B)


def terms_of(
    settings: MethodSettings,
    stream: MemoryStream,
    model: nn.Module,
    *,
    epoch: float = 0.0,
    smoothing: float = 0.0,
    others: Sequence[nn.Module] = (),
    epochs: int = 1,
    diary: Memory | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A method's terms and metrics on the first batch of a stream; `others` are its peers."""
    batch = stream.batch(0)
    batch = batch._replace(cursor=batch.cursor._replace(epoch=int(epoch)))
    peers = None
    if method_of(settings).asks_peers:
        own, *answers = (each(images_of(stream)) for each in (model, *others))
        peers = PeerLogits(own, tuple(answer.detach() for answer in answers))
    step = Step(
        student=model,
        images_B3HW=images_of(stream),
        batch=batch,
        teacher=lambda *, temperature=1.0, cache=0, views=None: stream.teacher_logits(
            views or batch, temperature=temperature, cache=cache
        ),
        teachers=stream.facts.teachers,
        epoch=epoch,
        label_smoothing=smoothing,
        metrics={},
        peers=peers,
        epochs=epochs,
        see=lambda views: prepare_views(views.images_BHW3, stream.seen, device="cpu"),
        memory=diary or Diary(),
    )
    return method_of(settings).terms(settings, step), step.metrics
