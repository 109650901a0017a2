"""Computes one update of every student from a group of batches.

A batch is copied to the device once, and each teacher's logits are decoded once for all students.
The losses of each method are in `distill.methods`. Shape letters: B batch, R cells, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cache_service.errors import UnsupportedError
from cache_service.models.preprocess import prepare_views
from distill.batches import Batch
from distill.finite import NonFiniteCheck
from distill.methods import OtherViews, PeerLogits, Step, ViewLabels, method_of, requirements_of
from distill.methods.requirements import Pairing
from distill.ranks import ONE_PROCESS, Ranks
from distill.reporting import Named, name_values
from distill.stream import Stream
from distill.students import StudentState


class TrainContext(NamedTuple):
    """Objects that all students of a run share.

    Attributes:
        stream: batches and the teachers' logits.
        device: device of the students.
        non_finite: checks every loss.
        ranks: the processes that train these students.
    """

    stream: Stream
    device: torch.device
    non_finite: NonFiniteCheck
    ranks: Ranks = ONE_PROCESS


class BatchTargets:
    """A batch on the device and the teachers' logits of its views, shared by all students.

    Attributes:
        batch: the batch on the device.
        samples_B: its samples on the device of the loader, usually the CPU, for messages.
        division: how the batch is divided among the ranks.
    """

    def __init__(self, context: TrainContext, batch: Batch) -> None:
        self.batch = batch.to(str(context.device))
        self.samples_B = batch.samples_B
        self.division = context.ranks.division(context.stream.facts.plan, batch.cursor.step)
        self._context = context
        self._decoded: dict[tuple[int, int, float], Tensor] = {}

    @torch.no_grad()
    def teacher_logits(
        self, *, temperature: float = 1.0, cache: int = 0, views: Batch | None = None
    ) -> Tensor:
        """Return a teacher's logits, float32 [B, R, C]. They are decoded once per temperature.

        `views` is `batch` (the default) or one of `batch.other_views`.
        """
        batch = self.batch if views is None else views
        # Ids are unique here, because `self.batch` keeps all these batches in memory.
        key = (id(batch), cache, temperature)
        if key not in self._decoded:
            # No autocast: bfloat16 would round the sums of stored cells that give derived cells.
            with torch.autocast(self._context.device.type, enabled=False):
                self._decoded[key] = self._context.stream.teacher_logits(
                    batch, temperature=temperature, cache=cache
                )
        return self._decoded[key]


def train_step(
    context: TrainContext, students: Sequence[StudentState], group: Sequence[Batch]
) -> list[Named]:
    """Update each student once from the batches of one accumulation group.

    The gradient is that of the mean loss over all views of the group, on all ranks. The result of a
    student does not depend on the other students, unless its method requires peers.

    Returns:
        For each student, the means over the group of its losses and of the metrics of its method.
        They stay on the device, so this function does not wait for a GPU.

    Raises:
        NonFiniteError: a loss is NaN or infinite. One process on a CPU raises it before the update.
    """
    num_views = context.ranks.count_views(context.stream.facts.plan, group)
    means: list[list[Named]] = [[] for _ in students]
    for student in students:
        student.optimizer.zero_grad(set_to_none=True)
    for batch in group:
        targets = BatchTargets(context, batch)
        # The last batch of an epoch may be shorter, so batches are weighted by their views.
        weight = len(batch.labels_B) / targets.division.copies / num_views
        peer_logits = _forward_peers(context, students, targets)
        for index, student in enumerate(students):
            loss, values = _loss(context, student, targets, _peers_of(index, peer_logits))
            context.non_finite.add(batch.cursor, batch.samples_B, values, student=student.name)
            _backward(student.scaler.scale(loss * weight), targets)
            means[index].append(Named(values.names, values.values_V * weight))
    totals = []
    for student, parts in zip(students, means, strict=True):
        values_V = torch.stack([part.values_V for part in parts]).sum(dim=0)
        values_V = context.ranks.add_up(student.model.parameters(), values_V)
        totals.append(Named(parts[0].names, values_V))
        _update_weights(student)
    return totals


def _loss(
    context: TrainContext, student: StudentState, targets: BatchTargets, peers: PeerLogits | None
) -> tuple[Tensor, Named]:
    """Compute the loss of one batch, and all values that the method reports."""
    batch, facts = targets.batch, context.stream.facts
    step = Step(
        student=student.model,
        images_B3HW=_input(context, student, batch),
        labels=ViewLabels(*batch[1:4]),
        samples_B=batch.samples_B,
        teacher_logits=targets.teacher_logits,
        teachers=facts.teachers,
        epoch=batch.cursor.step / facts.plan.steps_per_epoch,
        epochs=facts.plan.epochs,
        label_smoothing=student.config.label_smoothing,
        metrics={},
        other_views=partial(_other_views, context, student, targets),
        history=student.predictions,
        peers=peers,
        gather=targets.division.gather,
    )
    with _forward(context, student, targets):
        terms = method_of(student.settings).terms(student.settings, step)
    loss = torch.stack(list(terms.values())).sum()
    named_terms = {f"loss_{name}": term for name, term in terms.items()}
    return loss, name_values({"loss": loss, **named_terms, **step.metrics})


@contextmanager
def _forward(context: TrainContext, student: StudentState, targets: BatchTargets) -> Iterator[None]:
    """Context of a student's forward passes: random numbers, number type, batch statistics."""
    step, division = targets.batch.cursor.step, targets.division
    seed_step(student.config.seed, step, context.device, rank=division.rank)
    with student.autocast(context.device), division.statistics():
        yield


def _backward(loss: Tensor, targets: BatchTargets) -> None:
    """Add the gradients of a loss to those of the parameters.

    Activation checkpointing computes parts of the forward pass again here. Their batch norms need
    the context of the first computation.
    """
    # The context would intercept `backward` of a tensor, too, and run it outside of the context. A
    # gradient edge is no tensor.
    edge = torch.autograd.graph.get_gradient_edge(loss)
    with targets.division.statistics():
        torch.autograd.backward(edge, torch.ones_like(loss))


def _input(context: TrainContext, student: StudentState, batch: Batch) -> Tensor:
    """Preprocess views to the student's input, normalized [B, 3, H, W]."""
    return prepare_views(
        batch.images_BHW3,
        student.preprocess,
        device=context.device,
        channels_last=student.config.channels_last,
    )


def _other_views(
    context: TrainContext, student: StudentState, targets: BatchTargets, pairing: type[Pairing]
) -> OtherViews:
    views = targets.batch.other_views.get(pairing.name)
    if views is None:
        raise UnsupportedError(
            "the stream of this run provides no other views beside each batch's own.",
            hint="Train from a train file, or give a stream of your own `Batch.other_views`.",
        )
    return OtherViews(_input(context, student, views), partial(targets.teacher_logits, views=views))


def _forward_peers(
    context: TrainContext, students: Sequence[StudentState], targets: BatchTargets
) -> dict[int, Tensor]:
    """Compute logits of all students that require peers, before any weights change."""
    logits = {}
    for index, student in enumerate(students):
        if requirements_of(student.settings).peers:
            cursor = targets.batch.cursor
            with _forward(context, student, targets):
                logits[index] = student.model(_input(context, student, targets.batch))
            # Checked here, because otherwise the message would name a peer that uses these logits.
            values = name_values({"logits": logits[index].mean()})
            context.non_finite.add(cursor, targets.samples_B, values, student=student.name)
    return logits


def _peers_of(index: int, logits: dict[int, Tensor]) -> PeerLogits | None:
    if index not in logits:
        return None
    others = tuple(each.detach() for other, each in logits.items() if other != index)
    return PeerLogits(logits[index], others)


def _update_weights(student: StudentState) -> None:
    clip = student.config.clip_grad_norm
    if clip is not None:
        # The norm is that of the true gradients, not of those scaled for float16.
        student.scaler.unscale_(student.optimizer)
        nn.utils.clip_grad_norm_(student.model.parameters(), clip)
    student.scaler.step(student.optimizer)
    student.scaler.update()
    if student.average is not None:
        student.average.update(student.model)


def seed_step(seed: int, step: int, device: torch.device, *, rank: int = 0) -> None:
    """Seed torch's generators on the CPU and on `device` for one step of a student.

    A resumed run then draws the same random numbers as an uninterrupted run, regardless of draws by
    loaders and evaluations. No state of generators has to be saved. Ranks draw different numbers,
    because with equal ones dropout would drop the same units for different views.
    """
    # A 32-bit digest, because torch's CPU generator uses only the low 32 bits of a seed.
    drawn_by = f",{rank}" if rank else ""
    digest = blake2b(f"{seed},{step}{drawn_by}".encode(), digest_size=4).digest()
    mixed = int.from_bytes(digest, "little")
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(mixed)


@contextmanager
def private_random(device: torch.device) -> Iterator[None]:
    """Restore the state of the caller's generators on the CPU and on `device` at the end."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        yield
