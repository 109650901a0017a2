"""TensorBoard and Weights & Biases, for those who have them and ask for them."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from cache_service.errors import ConfigError
from cache_service.storage.local import LocalStorage
from distill.config import TrainConfig
from distill.events import Event, Listener

TENSORBOARD_NAME = "tensorboard"
WANDB_ID_NAME = "wandb-id.txt"

PRIVATE = {"dataset", "caches", "evaluate", "out"}
"""Settings that say where things lie here; they are nobody else's business."""


def trackers_of(config: TrainConfig, *, step: int) -> list[AbstractContextManager[Listener]]:
    """What a train file asks for, as the continuation of a run at `step`."""
    trackers: list[AbstractContextManager[Listener]] = []
    if config.tensorboard:
        trackers.append(_tensorboard(config.out, step))
    if config.wandb is not None:
        trackers.append(_wandb(config, config.wandb, step))
    return trackers


@contextmanager
def _tensorboard(out: str, step: int) -> Iterator[Listener]:
    module = _import(
        "torch.utils.tensorboard", "tensorboard: true needs TensorBoard.", extra="track"
    )
    writer = module.SummaryWriter(str(Path(out) / TENSORBOARD_NAME), purge_step=step)

    def write(event: Event) -> None:
        for name, value in _numbers(event).items():
            writer.add_scalar(name, value, event.step)

    try:
        yield write
    finally:
        writer.close()


@contextmanager
def _wandb(config: TrainConfig, project: str, step: int) -> Iterator[Listener]:
    """A resumed run is the same run there too, which ignores steps that it was told before."""
    module = _import("wandb", f"wandb: {project} needs Weights & Biases.", extra="wandb")
    try:
        run = module.init(
            project=project,
            id=_wandb_id(config.out, step),
            name=Path(config.out).name,
            dir=config.out,
            resume="allow",
            reinit="create_new",  # several students are several runs of one process
            config=config.model_dump(mode="json", exclude=PRIVATE),
        )
    except module.errors.Error as problem:
        first_line = (str(problem).splitlines() or [""])[0]
        raise ConfigError(
            f"Weights & Biases takes no run of project {project}: {first_line}.",
            hint="Run `wandb login`, or set WANDB_MODE=offline.",
        ) from problem

    def write(event: Event) -> None:
        numbers = _numbers(event)
        if numbers:
            run.log(numbers, step=event.step)

    try:
        yield write
    finally:
        run.finish()


def _wandb_id(out: str, step: int) -> str:
    """The run's name there, made up when it begins and kept beside its checkpoint."""
    storage = LocalStorage(out)
    known = storage.get(WANDB_ID_NAME)
    if known is not None and step:
        return known.decode().strip()
    made_up = uuid.uuid4().hex[:16]
    storage.put(WANDB_ID_NAME, f"{made_up}\n".encode())
    storage.sweep()
    return made_up


def _import(name: str, needs: str, *, extra: str) -> Any:
    try:
        # By name, because without it installed it cannot even be typed.
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(needs, hint=f"Run `pip install 'kd-cache[{extra}]'`.") from error


def _numbers(event: Event) -> dict[str, float]:
    """What can be drawn, as `step/loss`."""
    if event.kind == "start":
        return {}
    return {
        f"{event.kind}/{name}": value
        for name, value in event.values.items()
        if isinstance(value, int | float)
    }
