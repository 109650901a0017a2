"""One update of every student: views in, logits of students and teachers, losses, new weights.

A batch is moved to the device once and each teacher's logits are decoded once for all students.
What a method computes is in `distill/methods`.
Shape letters: B batch, R cells, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cache_service.errors import UnsupportedError
from cache_service.models.preprocess import prepare_views
from distill.batches import Batch
from distill.finite import FiniteWatch
from distill.methods import OtherViews, PeerLogits, Step, ViewLabels, method_of, requirements_of
from distill.methods.requirements import Pairing
from distill.randomness import seed_step
from distill.stream import Stream
from distill.student_state import StudentState
from distill.totals import Named, name_values


class TrainContext(NamedTuple):
    """What all students share, from the first step to the last.

    Attributes:
        stream: batches, and what teachers say about them.
        device: where the students are.
        watch: over every loss.
    """

    stream: Stream
    device: torch.device
    watch: FiniteWatch


class BatchTargets:
    """One batch for any number of students.

    Attributes:
        batch: on the device.
        samples_B: its samples, where they were read.
    """

    def __init__(self, context: TrainContext, batch: Batch) -> None:
        self.batch = batch.to(str(context.device))
        self.samples_B = batch.samples_B
        self._context = context
        self._answers: dict[tuple[int, int, float], Tensor] = {}

    @torch.no_grad()
    def teacher_logits(
        self, *, temperature: float = 1.0, cache: int = 0, views: Batch | None = None
    ) -> Tensor:
        """A teacher's logits, float32 [B, R, C]; the same tensor for whoever asks again.

        `views` is a part of `batch`, such as one of `batch.other_views`; by default all of it.
        """
        batch = self.batch if views is None else views
        asked = (id(batch), cache, temperature)
        if asked not in self._answers:
            # Outside of autocast: derived cells are sums over stored ones; bfloat16 rounds them.
            with torch.autocast(self._context.device.type, enabled=False):
                self._answers[asked] = self._context.stream.teacher_logits(
                    batch, temperature=temperature, cache=cache
                )
        return self._answers[asked]


def train_step(
    context: TrainContext, students: Sequence[StudentState], group: Sequence[Batch]
) -> list[Named]:
    """One update of each student, from the batches of one accumulation group.

    The gradient is that of the mean over all views of the group. Returns means over them (losses
    and what the method reports), on the device: nothing here waits for a GPU. A student's numbers
    do not depend on who learns beside it, unless its method says so.

    Raises:
        NonFiniteError: a loss is no number; on a CPU before the update.
    """
    num_views = sum(len(batch.labels_B) for batch in group)
    means: list[list[Named]] = [[] for _ in students]
    for student in students:
        student.optimizer.zero_grad(set_to_none=True)
    for batch in group:
        targets, share = BatchTargets(context, batch), len(batch.labels_B) / num_views
        answers = _answer_as_peers(context, students, targets)
        for place, student in enumerate(students):
            terms, metrics = _learn_terms(context, student, targets, _peers_of(place, answers))
            loss = torch.stack(list(terms.values())).sum()
            parts = {f"loss_{name}": term for name, term in terms.items()}
            named = name_values({"loss": loss, **parts, **metrics})
            context.watch.see(batch.cursor, batch.samples_B, named, student=student.name)
            torch.autograd.backward(student.scaler.scale(loss * share))
            means[place].append(Named(named.names, named.values_V * share))
    for student in students:
        _move(student)
    return [_sum(parts) for parts in means]


def _learn_terms(
    context: TrainContext, student: StudentState, targets: BatchTargets, peers: PeerLogits | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The method's loss terms and metrics of one batch."""
    cursor = targets.batch.cursor
    seed_step(student.config.seed, cursor.step, context.device)
    step = Step(
        student=student.model,
        images_B3HW=_see(context, student, targets.batch),
        labels=ViewLabels(*targets.batch[1:4]),
        samples_B=targets.batch.samples_B,
        teacher_logits=targets.teacher_logits,
        teachers=context.stream.facts.teachers,
        epoch=cursor.step / context.stream.facts.plan.steps_per_epoch,
        label_smoothing=student.config.label_smoothing,
        metrics={},
        peers=peers,
        epochs=context.stream.facts.plan.epochs,
        other_views=partial(_other_views, context, student, targets),
        history=student.predictions,
    )
    with student.autocast(context.device):
        terms = method_of(student.settings).terms(student.settings, step)
    return terms, step.metrics


def _other_views(
    context: TrainContext, student: StudentState, targets: BatchTargets, pairing: type[Pairing]
) -> OtherViews:
    views = targets.batch.other_views.get(pairing.name)
    if views is None:
        raise UnsupportedError(
            "the stream of this run provides no other views beside each batch's own.",
            hint="Train from a train file, or give a stream of your own `Batch.other_views`.",
        )
    return OtherViews(_see(context, student, views), partial(targets.teacher_logits, views=views))


def _see(context: TrainContext, student: StudentState, batch: Batch) -> Tensor:
    return prepare_views(
        batch.images_BHW3,
        student.preprocess,
        device=context.device,
        channels_last=student.config.channels_last,
    )


def _answer_as_peers(
    context: TrainContext, students: Sequence[StudentState], targets: BatchTargets
) -> dict[int, Tensor]:
    """Logits of each student that others learn from: all answer before any of them moves."""
    answers = {}
    for place, student in enumerate(students):
        if requirements_of(student.settings).peers:
            cursor = targets.batch.cursor
            seed_step(student.config.seed, cursor.step, context.device)
            with student.autocast(context.device):
                answers[place] = student.model(_see(context, student, targets.batch))
            # Looked at by themselves, or a peer whose loss they spoil would be blamed for them.
            seen = name_values({"logits": answers[place].mean()})
            context.watch.see(cursor, targets.samples_B, seen, student=student.name)
    return answers


def _peers_of(place: int, answers: dict[int, Tensor]) -> PeerLogits | None:
    if place not in answers:
        return None
    others = tuple(answer.detach() for other, answer in answers.items() if other != place)
    return PeerLogits(answers[place], others)


def _move(student: StudentState) -> None:
    """Weights go along the gradients that are there, and their average along with them."""
    clip = student.config.clip_grad_norm
    if clip is not None:
        student.scaler.unscale_(student.optimizer)
        nn.utils.clip_grad_norm_(student.model.parameters(), clip)
    student.scaler.step(student.optimizer)
    student.scaler.update()
    if student.average is not None:
        student.average.update(student.model)


def _sum(parts: Sequence[Named]) -> Named:
    return Named(parts[0].names, torch.stack([part.values_V for part in parts]).sum(dim=0))
