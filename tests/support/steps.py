"""One step of a method on a batch in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cache_service.models.preprocess import prepare_views
from distill.batches import Batch
from distill.methods import (
    METHODS,
    MethodSettings,
    OtherViews,
    PeerLogits,
    Step,
    ViewLabels,
    method_of,
    requirements_of,
)
from distill.methods.prediction_history import PastPredictions
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


class MemoryHistory:
    """A student's own predictions, in memory."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], Tensor] = {}

    def write(self, epoch: int, samples_B: Tensor, logits_BC: Tensor) -> None:
        for sample, row_C in zip(samples_B.tolist(), logits_BC, strict=True):
            self.rows[epoch, sample] = row_C.clone()

    def read(self, epoch: int, samples_B: Tensor) -> PastPredictions:
        rows = [self.rows.get((epoch, sample)) for sample in samples_B.tolist()]
        blank = torch.zeros(NUM_CLASSES)
        known_B = torch.tensor([row is not None for row in rows])
        return PastPredictions(
            torch.stack([blank if row is None else row for row in rows]), known_B
        )


def terms_of(
    settings: MethodSettings,
    stream: MemoryStream,
    model: nn.Module,
    *,
    epoch: float = 0.0,
    smoothing: float = 0.0,
    others: Sequence[nn.Module] = (),
    epochs: int = 1,
    history: Any = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A method's terms and metrics on the first batch of a stream; `others` are its peers."""
    batch = stream.batch(0)
    batch = batch._replace(cursor=batch.cursor._replace(epoch=int(epoch)))
    peers = None
    if requirements_of(settings).peers:
        own, *answers = (each(images_of(stream)) for each in (model, *others))
        peers = PeerLogits(own, tuple(answer.detach() for answer in answers))

    def logits_of(views: Batch) -> Any:
        def teacher_logits(*, temperature: float = 1.0, cache: int = 0) -> Tensor:
            return stream.teacher_logits(views, temperature=temperature, cache=cache)

        return teacher_logits

    def other_views(pairing: Any) -> OtherViews:
        views = batch.other_views[pairing.name]
        images = prepare_views(views.images_BHW3, stream.seen, device="cpu")
        return OtherViews(images, logits_of(views))

    step = Step(
        student=model,
        images_B3HW=images_of(stream),
        labels=ViewLabels(*batch[1:4]),
        samples_B=batch.samples_B,
        teacher_logits=logits_of(batch),
        teachers=stream.facts.teachers,
        epoch=epoch,
        label_smoothing=smoothing,
        metrics={},
        peers=peers,
        epochs=epochs,
        other_views=other_views,
        history=history or MemoryHistory(),
    )
    return method_of(settings).terms(settings, step), step.metrics
