"""Students: their creation, their preprocessing, and everything that changes while they train."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cache_service.errors import ConfigError
from cache_service.format.spec import Preprocess
from cache_service.models.create import create_model
from distill.checkpoint import START_OVER
from distill.config import StudentConfig, TrainConfig
from distill.methods import MethodSettings, PredictionHistory, RunFacts, method_of, requirements_of
from distill.optim import make_optimizer
from distill.reporting import EpochTotals
from distill.scores import Evaluation
from distill.stream import Stream

HALF = (0.5, 0.5, 0.5)
"""Default mean and standard deviation: the input is in -1 to 1."""


class Student(NamedTuple):
    """A network and its preprocessing."""

    model: nn.Module
    preprocess: Preprocess


def make_student(
    config: StudentConfig,
    *,
    num_classes: int,
    view_size: int,
    teacher: Preprocess | None,
    seed: int,
) -> Student:
    """Create the student of a train file, on the CPU.

    Args:
        config: `student:` of the train file.
        num_classes: of the dataset.
        view_size: side of the views, px.
        teacher: preprocessing of the teacher, if there is one.
        seed: of the run; initializes the weights unless the student has one of its own.

    Raises:
        ConfigError: no such model, other class count, or a checkpoint that does not fit.
    """
    if config.num_classes not in (None, num_classes):
        raise ConfigError(
            f"student.num_classes={config.num_classes}, but the dataset has {num_classes} classes."
        )
    model = create_model(
        config.model,
        num_classes=num_classes,
        pretrained=config.pretrained,
        checkpoint=config.checkpoint,
        checkpoint_weights=config.checkpoint_weights,
        seed=seed if config.seed is None else config.seed,
        **config.model_args,
    )
    return Student(model, choose_preprocess(config, model, view_size=view_size, teacher=teacher))


def choose_preprocess(
    config: StudentConfig, model: nn.Module, *, view_size: int, teacher: Preprocess | None
) -> Preprocess:
    """The preprocessing of a student.

    Mean and standard deviation are those of the train file, else those that the pretrained weights
    were trained with, else the teacher's, else 0.5.
    """
    own: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    mean, std = HALF, HALF
    if config.mean is not None and config.std is not None:
        mean, std = config.mean, config.std
    elif config.pretrained and "mean" in own and "std" in own:
        mean, std = own["mean"], own["std"]
    elif teacher is not None:
        mean, std = teacher.mean, teacher.std
    return Preprocess(
        size=config.input_size or view_size,
        mean=mean,
        std=std,
        interpolation=config.interpolation,
    )


def restore_student(payload: dict[str, Any], config: StudentConfig) -> Student:
    """The student of a checkpoint, on the CPU: its weight average, where it has one.

    Raises:
        ConfigError: the model's code no longer fits its weights.
    """
    model = create_model(config.model, num_classes=payload["num_classes"], **config.model_args)
    try:
        model.load_state_dict(payload["ema"] if payload["ema"] is not None else payload["model"])
    except RuntimeError as problem:
        raise ConfigError(
            f"the checkpoint's weights do not fit {config.model}: its code has changed since."
        ) from problem
    return Student(model, Preprocess.model_validate(payload["preprocess"]))


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda:1` means here.

    Raises:
        ConfigError: this machine has no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name} was requested; this machine has {torch.cuda.device_count()} GPUs that "
            "torch can use.",
            hint="Use `--set device=auto`.",
        )
    return device


class WeightAverage:
    """`average <- decay * average + (1 - decay) * weights`, once per update.

    Running statistics of norms are averaged like weights; whole numbers, such as their counters,
    are copied. The average starts at the initial weights, so choose a decay whose memory,
    1 / (1 - decay) updates, is short against the run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the model's present weights."""
        averages: list[Tensor] = []
        weights: list[Tensor] = []
        # Not by state dict: a tensor shared by two layers is listed there twice.
        for average, present in chain(
            zip(self.model.parameters(), model.parameters(), strict=True),
            zip(self.model.buffers(), model.buffers(), strict=True),
        ):
            if average.is_floating_point():
                averages.append(average)
                weights.append(present)
            else:
                average.copy_(present)
        torch._foreach_lerp_(averages, weights, 1 - self._decay)


@dataclass
class History:
    """The progress of a run and its scores.

    Attributes:
        step: batches trained on.
        totals: means over the current epoch.
        last: scores after the last scored epoch.
        best: scores of the epoch with the best top-1. It is chosen on the evaluation set, so it is
            too optimistic.
        best_epoch: epochs completed at `best`.
    """

    step: int = 0
    totals: EpochTotals = field(default_factory=EpochTotals)
    last: Evaluation | None = None
    best: Evaluation | None = None
    best_epoch: int | None = None

    def note(self, evaluation: Evaluation, epoch: int) -> None:
        """Add the scores after so many epochs."""
        self.last = evaluation
        if self.best is None or evaluation.top1 > self.best.top1:
            self.best, self.best_epoch = evaluation, epoch

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "step": self.step,
            "totals": self.totals.state(),
            "last": None if self.last is None else self.last._asdict(),
            "best": None if self.best is None else self.best._asdict(),
            "best_epoch": self.best_epoch,
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from a checkpoint."""
        self.step = state["step"]
        self.totals.restore(state["totals"], device)
        self.last = None if state["last"] is None else Evaluation(**state["last"])
        self.best = None if state["best"] is None else Evaluation(**state["best"])
        self.best_epoch = state["best_epoch"]


ALONE = ""
"""Name of the student of a train file without `students`."""

AMP_TYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StudentState:
    """One student and its training state.

    Attributes:
        name: among the students of the run.
        config: the train file that it would have if it were alone.
        model: the network, on its device.
        preprocess: how a view becomes its input.
        optimizer: of its parameters.
        scaler: of float16 gradients; does nothing for other types.
        average: of its weights, where `ema` is set.
        predictions: what it predicted for each sample, where its method requires that.
        history: its progress and scores.
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
        """Settings of its method."""
        return self.config.method

    @property
    def kept_model(self) -> nn.Module:
        """What is evaluated and exported: the average, or the model where there is none."""
        return self.model if self.average is None else self.average.model

    @property
    def learning_rate(self) -> float:
        """Of the latest update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def autocast(self, device: torch.device) -> torch.autocast:
        """The number type of its forward passes."""
        amp = self.config.amp
        return torch.autocast(device.type, AMP_TYPES[amp], enabled=amp != "none")

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint holds of it."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.average is None else self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history.state(),
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore the state of a checkpoint.

        Raises:
            ConfigError: it belongs to another network, although the settings are the same.
        """
        try:
            self.model.load_state_dict(state["model"])
            if self.average is not None:
                self.average.model.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as problem:
            raise ConfigError(
                "the checkpoint does not fit the student: the model's code has changed since.",
                hint=START_OVER,
            ) from problem
        self.scaler.load_state_dict(state["scaler"])
        self.history.restore(state["history"], device)


def make_student_state(
    config: TrainConfig, stream: Stream, device: torch.device, *, name: str = ALONE
) -> StudentState:
    """The student of a train file, checked against the stream. Reads no row.

    Raises:
        ConfigError: model, method or their settings do not fit each other.
        UnsupportedError: the model does not support the method.
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
        predictions=PredictionHistory(
            config.out, num_samples=facts.plan.num_samples, num_classes=facts.num_classes
        )
        if requirements_of(config.method).prediction_history
        else None,
    )
