"""`ddgsd-cifar100`: a network that is its own teacher, by two views of each image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from cache_service.format.frozen import Frozen
from cli.experiments.reproduce.cohort import Outcome
from cli.experiments.reproduce.machine import describe_machine, describe_versions
from cli.experiments.reproduce.order import Order, Reproduction
from cli.experiments.reproduce.school import (
    Document,
    ImageSettings,
    School,
    TrainingSettings,
    error_rate,
    network,
    seconds_of,
)
from cli.experiments.reproduce.small_nets import RESNET, RESNET18
from cli.experiments.reproduce.table import Goal, Row, Table
from distill.optim import SGD
from distill.schedule import MultiStep

NAME = "ddgsd-cifar100"

SOURCE = "Xu, Liu: Data-Distortion Guided Self-Distillation for Deep Neural Networks, AAAI 2019"

PUBLISHED = {"ce": 30.15, "ddgsd": 26.6}
"""Test errors of ResNet-18, %."""

TITLES = {"ce": "labels", "ddgsd": "DDGSD"}

NOTE = (
    "The five terms and their weights are the paper's; rates, lengths and batches are this "
    "project's. The published figures are those of a public implementation; another one reports "
    "accuracies of 76.24 % without and 76.61 % with the method, so the two disagree."
)

VIEWS_NOTE = (
    "Both networks take the same number of steps, on the same views; DDGSD also sees a second view "
    "of each image at every step."
)


class DdgsdSettings(Frozen):
    """Network, lengths and the weights of the terms."""

    images: ImageSettings = ImageSettings()
    network: Document = Field(default_factory=lambda: network(RESNET18))
    training: TrainingSettings = TrainingSettings(
        optimizer=SGD(lr=0.1, nesterov=True, weight_decay=5e-4),
        schedule=MultiStep(milestones=(60, 120, 160), gamma=0.2),
        epochs=200,
        batch_size=128,
        clip_grad_norm=None,
    )
    consistency: Annotated[float, Field(ge=0, description="Of the views' KL; lambda.")] = 1.0
    mmd: Annotated[float, Field(ge=0, description="Of the features; mu.")] = 5e-4


FULL = DdgsdSettings(images=ImageSettings(workers=8))
"""For a GPU."""

QUICK = DdgsdSettings(
    images=ImageSettings(num_classes=20, shrink=2),
    network=network(RESNET, depth=8, widths=[16, 16, 32, 64]),
    training=TrainingSettings(
        optimizer=SGD(lr=0.1, nesterov=True, weight_decay=5e-4),
        schedule=MultiStep(milestones=(6, 10), gamma=0.2),
        epochs=12,
        batch_size=128,
        clip_grad_norm=None,
    ),
)
"""Sized for five minutes on two cores: a small network, 20 classes at 16 px."""


def reproduce(order: Order, settings: DdgsdSettings | None = None) -> Table:
    """Train what is not trained yet, and put the figures together.

    Raises:
        DatasetError: CIFAR-100 is not where it should be.
        ConfigError, SpecMismatchError: `order.out` holds runs of other settings.
    """
    settings = settings or (QUICK if order.quick else FULL)
    school = School(NAME, settings.images, order)
    school.open()
    outcomes = school.train(
        _students(settings, order),
        settings.training,
        folder="networks",
        learns={"augment": settings.images.augment()},
    )
    rows = {method: _row(method, outcomes) for method in PUBLISHED}
    return Table(
        name=NAME,
        title="Self-distillation by two views on CIFAR-100",
        source=f"{SOURCE}.",
        quick=order.quick,
        command=order.command(NAME),
        rows=tuple(rows.values()),
        goals=(_goal(rows),),
        notes=(NOTE, VIEWS_NOTE),
        settings=settings.model_dump(mode="json"),
        machine=describe_machine(order.device),
        versions=describe_versions(),
        seconds={f"{len(outcomes)} networks together": seconds_of(outcomes)},
        unit="error rate",
    )


def _students(settings: DdgsdSettings, order: Order) -> dict[str, Document]:
    weights = {"consistency": settings.consistency, "mmd": settings.mmd}
    methods: dict[str, Document] = {
        "ce": {"name": "ce"},
        "ddgsd": {"name": "ddgsd", **weights},
    }
    return {
        f"{name}-{seed}": {"student": settings.network, "method": method, "seed": seed}
        for name, method in methods.items()
        for seed in range(order.seeds)
    }


def _row(method: str, outcomes: Mapping[str, Outcome]) -> Row:
    runs = [run for name, run in outcomes.items() if name.rpartition("-")[0] == method]
    return Row(
        what=TITLES[method],
        published=PUBLISHED[method],
        runs=tuple(run.measured(error_rate) for run in runs),
    )


def _goal(rows: Mapping[str, Row]) -> Goal:
    text = "fewer errors with DDGSD than with labels, mean over seeds"
    plain, own = rows["ce"].mean, rows["ddgsd"].mean
    if plain is None or own is None:
        return Goal(text=text, measured="a run failed", met=None)
    return Goal(text=text, measured=f"{own:.2f}, labels {plain:.2f}", met=own < plain)


REPRODUCTION = Reproduction(
    name=NAME,
    summary="CIFAR-100, ResNet-18 alone: 30.15 % errors on labels, 26.60 % with two views.",
    data="data/cifar100",
    seeds=3,
    run=reproduce,
    options=frozenset({"device"}),
)
