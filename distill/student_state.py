"""A student and everything that changes as it learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cache_service.errors import ConfigError
from cache_service.format.spec import Preprocess
from distill.config import TrainConfig
from distill.ema import WeightAverage
from distill.history import History
from distill.methods import (
    MethodSettings,
    PredictionHistory,
    RunFacts,
    method_of,
    requirements_of,
)
from distill.optim import make_optimizer
from distill.stream import Stream, StreamFacts
from distill.students import make_student

ALONE = ""
"""Name of a student that is the only one of its train file: nothing needs to tell it apart."""

AMP_TYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StudentState:
    """One student.

    Attributes:
        name: among the students of the run.
        config: the train file that it would have if it were alone.
        model: the network, on its device.
        preprocess: what it wants done to a view.
        optimizer: of its parameters.
        scaler: of float16 gradients; does nothing for other types.
        average: of its weights, where the run keeps one.
        predictions: what it predicted for each sample, where its method requires that.
        history: how far it is.
    """

    name: str
    config: TrainConfig
    model: nn.Module
    preprocess: Preprocess
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    predictions: PredictionHistory | None = None
    history: History = field(default_factory=History)

    @property
    def settings(self) -> MethodSettings:
        """Of the method it learns by."""
        return self.config.method

    @property
    def kept_model(self) -> nn.Module:
        """What is evaluated and kept: the average, or the model where there is none."""
        return self.model if self.average is None else self.average.model

    def autocast(self, device: torch.device) -> torch.autocast:
        """The arithmetic of its forward passes."""
        amp = self.config.amp
        return torch.autocast(device.type, AMP_TYPES[amp], enabled=amp != "none")

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must hold of it."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.average is None else self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history.state(),
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Go back to a state.

        Raises:
            ConfigError: it is of another network, though the settings are the same.
        """
        try:
            self.model.load_state_dict(state["model"])
            if self.average is not None:
                self.average.model.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as problem:
            raise ConfigError(
                "the checkpoint does not fit the student: the model's code has changed since.",
                hint="Choose another `out`, or remove the checkpoint to start over.",
            ) from problem
        self.scaler.load_state_dict(state["scaler"])
        self.history.restore(state["history"], device)


def make_student_state(
    config: TrainConfig, stream: Stream, device: torch.device, *, name: str = ALONE
) -> StudentState:
    """The student of a train file, checked against what it is to learn from. Reads no row.

    Raises:
        ConfigError: the model, the method or their settings do not suit each other.
        UnsupportedError: the model cannot do what the method asks of it.
    """
    facts = stream.facts
    student = make_student(
        config.student,
        num_classes=facts.num_classes,
        view_size=facts.view_size,
        teacher=facts.teachers[0].preprocess if facts.teachers else None,
        seed=config.seed,
    )
    model = student.model.to(device).train()
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    method_of(config.method).check(
        config.method,
        RunFacts(
            facts.teachers, model, facts.num_classes, student.preprocess.size, mixes=facts.mixes
        ),
    )
    return StudentState(
        name=name,
        config=config,
        model=model,
        preprocess=student.preprocess,
        optimizer=make_optimizer(config.optimizer, model),
        scaler=torch.amp.GradScaler(device.type, enabled=config.amp == "float16"),
        average=None if config.ema is None else WeightAverage(model, config.ema),
        predictions=_predictions(config, facts),
    )


def _predictions(config: TrainConfig, facts: StreamFacts) -> PredictionHistory | None:
    if not requirements_of(config.method).prediction_history:
        return None
    return PredictionHistory(
        config.out, num_samples=facts.plan.num_samples, num_classes=facts.num_classes
    )
