"""One step of a method on a batch in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cache_service.models.preprocess import prepare_views
from distill.methods import METHODS, MethodSettings, Step, method_of
from support.streams import MemoryStream, train_config


def memory(*, mixed: bool = False, num_teachers: int = 1, **changes: Any) -> MemoryStream:
    """Batches of 8, under teachers who say random things."""
    config = train_config("unused", batch_size=8)
    return MemoryStream(config, mixed=mixed, num_teachers=num_teachers, **changes)


def images_of(stream: MemoryStream) -> Tensor:
    return prepare_views(stream.batch(0).images_BHW3, stream.seen, device="cpu")


def settings_of(name: str, **values: Any) -> MethodSettings:
    return METHODS[name].settings(**values)


def terms_of(
    settings: MethodSettings, stream: MemoryStream, model: nn.Module, *, epoch: float = 0.0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A method's terms and metrics on the first batch of a stream."""
    batch = stream.batch(0)
    step = Step(
        student=model,
        images_B3HW=images_of(stream),
        batch=batch,
        teacher=lambda *, temperature=1.0, cache=0: stream.teach(
            batch, temperature=temperature, cache=cache
        ),
        teachers=stream.facts.teachers,
        epoch=epoch,
        label_smoothing=0.0,
        metrics={},
    )
    return method_of(settings).terms(settings, step), step.metrics
