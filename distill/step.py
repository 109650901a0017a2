"""One update of every student: views in, answers of students and teachers, losses, new weights.

This is the whole flow of training on one screen. What a method computes is in `distill/methods`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cache_service.models.preprocess import prepare_views
from distill.batches import Batch
from distill.learner import Learner
from distill.lesson import Lesson, Run
from distill.methods import PeerLogits, Step, method_of
from distill.randomness import seed_step
from distill.totals import Named, name_values


def train_step(run: Run, learners: Sequence[Learner], group: Sequence[Batch]) -> list[Named]:
    """One update of each student, from the batches of one accumulation group.

    The gradient is that of the mean over all views of the group. Returns means over them (losses
    and what the method reports), on the device: nothing here waits for a GPU. A student's numbers
    do not depend on who learns beside it, unless its method says so.

    Raises:
        NonFiniteError: a loss is no number; on a CPU before the update.
    """
    num_views = sum(len(batch.labels_B) for batch in group)
    means: list[list[Named]] = [[] for _ in learners]
    for learner in learners:
        learner.optimizer.zero_grad(set_to_none=True)
    for batch in group:
        lesson, share = Lesson(run, batch), len(batch.labels_B) / num_views
        answers = _answer_as_peers(run, learners, lesson)
        for place, learner in enumerate(learners):
            terms, metrics = _learn_terms(run, learner, lesson, _peers_of(place, answers))
            loss = torch.stack(list(terms.values())).sum()
            parts = {f"loss_{name}": term for name, term in terms.items()}
            named = name_values({"loss": loss, **parts, **metrics})
            run.watch.see(batch.cursor, batch.samples_B, named, student=learner.name)
            torch.autograd.backward(learner.scaler.scale(loss * share))
            means[place].append(Named(named.names, named.values_V * share))
    for learner in learners:
        _move(learner)
    return [_sum(parts) for parts in means]


def _learn_terms(
    run: Run, learner: Learner, lesson: Lesson, peers: PeerLogits | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The method's loss terms and metrics of one batch."""
    cursor = lesson.batch.cursor
    seed_step(learner.config.seed, cursor.step, run.device)
    step = Step(
        student=learner.model,
        images_B3HW=_see(run, learner, lesson.batch),
        batch=lesson.batch,
        teacher=lesson.teach,
        teachers=run.stream.facts.teachers,
        epoch=cursor.step / run.stream.facts.plan.steps_per_epoch,
        label_smoothing=learner.config.label_smoothing,
        metrics={},
        peers=peers,
        epochs=run.stream.facts.plan.epochs,
        see=partial(_see, run, learner),
        memory=learner.own_rows,
    )
    with learner.autocast(run.device):
        terms = method_of(learner.settings).terms(learner.settings, step)
    return terms, step.metrics


def _see(run: Run, learner: Learner, batch: Batch) -> Tensor:
    return prepare_views(
        batch.images_BHW3,
        learner.preprocess,
        device=run.device,
        channels_last=learner.config.channels_last,
    )


def _answer_as_peers(run: Run, learners: Sequence[Learner], lesson: Lesson) -> dict[int, Tensor]:
    """Logits of each student that others learn from: all answer before any of them moves."""
    answers = {}
    for place, learner in enumerate(learners):
        if method_of(learner.settings).asks_peers:
            cursor = lesson.batch.cursor
            seed_step(learner.config.seed, cursor.step, run.device)
            with learner.autocast(run.device):
                answers[place] = learner.model(_see(run, learner, lesson.batch))
            # Looked at by themselves, or a peer whose loss they spoil would be blamed for them.
            seen = name_values({"logits": answers[place].mean()})
            run.watch.see(cursor, lesson.samples_B, seen, student=learner.name)
    return answers


def _peers_of(place: int, answers: dict[int, Tensor]) -> PeerLogits | None:
    if place not in answers:
        return None
    others = tuple(answer.detach() for other, answer in answers.items() if other != place)
    return PeerLogits(answers[place], others)


def _move(learner: Learner) -> None:
    """Weights go along the gradients that are there, and their average along with them."""
    clip = learner.config.clip_grad_norm
    if clip is not None:
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(learner.model.parameters(), clip)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    if learner.average is not None:
        learner.average.update(learner.model)


def _sum(parts: Sequence[Named]) -> Named:
    return Named(parts[0].names, torch.stack([part.values_V for part in parts]).sum(dim=0))
