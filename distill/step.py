"""One update of one student: views in, answers of student and teachers, a loss, new weights.

This is the whole flow of training on one screen. What a method computes is in `distill/methods`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cache_service.models.preprocess import prepare_views
from distill.batches import Batch
from distill.config import TrainConfig
from distill.finite import FiniteWatch
from distill.learner import Learner
from distill.methods import Step, method_of
from distill.randomness import seed_step
from distill.stream import Stream
from distill.totals import Named, name_values

AMP_TYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Run(NamedTuple):
    """What stays the same from the first step to the last."""

    config: TrainConfig
    stream: Stream
    device: torch.device
    watch: FiniteWatch


def train_step(run: Run, learner: Learner, group: Sequence[Batch]) -> Named:
    """One update, from the batches of one accumulation group.

    The gradient is that of the mean over all views of the group. Returns means over them (losses
    and what the method reports), on the device: nothing here waits for a GPU.

    Raises:
        NonFiniteError: a loss is no number; on a CPU before the update.
    """
    num_views = sum(len(batch.labels_B) for batch in group)
    means: list[Named] = []
    learner.optimizer.zero_grad(set_to_none=True)
    for batch in group:
        terms, metrics = _learn_terms(run, learner, batch)
        loss = torch.stack(list(terms.values())).sum()
        parts = {f"loss_{name}": term for name, term in terms.items()}
        named = name_values({"loss": loss, **parts, **metrics})
        run.watch.see(batch.cursor, batch.samples_B, named)
        share = len(batch.labels_B) / num_views
        torch.autograd.backward(learner.scaler.scale(loss * share))
        means.append(Named(named.names, named.values_V * share))
    if run.config.clip_grad_norm is not None:
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(learner.model.parameters(), run.config.clip_grad_norm)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    if learner.average is not None:
        learner.average.update(learner.model)
    return Named(means[0].names, torch.stack([part.values_V for part in means]).sum(dim=0))


def _learn_terms(
    run: Run, learner: Learner, batch: Batch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The method's loss terms and metrics of one batch."""
    config, device = run.config, run.device
    seed_step(config.seed, batch.cursor.step, device)
    on_device = batch.to(str(device))
    step = Step(
        student=learner.model,
        images_B3HW=prepare_views(
            on_device.images_BHW3,
            learner.preprocess,
            device=device,
            channels_last=config.channels_last,
        ),
        batch=on_device,
        teacher=partial(_teach, run, on_device),
        teachers=run.stream.facts.teachers,
        epoch=batch.cursor.step / run.stream.facts.plan.steps_per_epoch,
        label_smoothing=config.label_smoothing,
        metrics={},
    )
    with torch.autocast(device.type, AMP_TYPES[config.amp], enabled=config.amp != "none"):
        terms = method_of(learner.settings).terms(learner.settings, step)
    return terms, step.metrics


@torch.no_grad()
def _teach(run: Run, batch: Batch, *, temperature: float = 1.0, cache: int = 0) -> Tensor:
    # Outside of autocast: derived cells are sums over stored ones, which bfloat16 would round.
    with torch.autocast(run.device.type, enabled=False):
        return run.stream.teach(batch, temperature=temperature, cache=cache)
