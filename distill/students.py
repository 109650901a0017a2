"""Students: creation, preprocessing and training state."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cache_service.errors import ConfigError, UnsupportedError
from cache_service.format.spec import Preprocess
from cache_service.models.answers import describe
from cache_service.models.create import create_model
from cache_service.models.features import is_cell_net
from cache_service.models.lookalikes import small_image_notice
from cache_service.models.weights import load_checkpoint
from distill.checkpoint import START_OVER
from distill.config import StudentConfig, TrainConfig
from distill.methods import MethodSettings, PredictionHistory, RunFacts, method_of, requirements_of
from distill.optim import make_optimizer
from distill.reporting import EpochTotals
from distill.scores import Evaluation
from distill.stream import Stream
from distill.student_probe import probe_student, read_student, require_channels_last

HALF = (0.5, 0.5, 0.5)
"""Default mean and standard deviation. They scale the input to -1 to 1."""


MAX_CODES = 64
"""Codes that torch.compile keeps of one network's function."""


class Student(NamedTuple):
    """A network and its preprocessing."""

    model: nn.Module
    preprocess: Preprocess
    weights_from: str = ""
    """Which weights of a checkpoint were loaded, for people."""
    notice: str = ""
    """What its user should know of this choice of network."""


def make_student(
    config: StudentConfig,
    *,
    num_classes: int,
    view_size: int,
    teacher: Preprocess | None,
    seed: int,
) -> Student:
    """Create the student of a train file, on the CPU, and probe it on random images.

    Args:
        config: section `student` of the train file.
        num_classes: number of classes of the dataset.
        view_size: side of the views, px.
        teacher: preprocessing of the teacher, if any.
        seed: seed of the run. It initializes the weights unless `config.seed` is set.

    Raises:
        ConfigError: the model is unknown, its number of classes differs from the dataset's, or the
            checkpoint or the input does not fit the model.
        UnsupportedError: it does not answer logits.
    """
    if config.num_classes not in (None, num_classes):
        raise ConfigError(
            f"student.num_classes={config.num_classes}, but the dataset has {num_classes} classes."
        )
    model = create_model(
        config.model,
        num_classes=num_classes,
        pretrained=config.pretrained,
        seed=seed if config.seed is None else config.seed,
        **config.model_args,
    )
    preprocess = choose_preprocess(config, model, view_size=view_size, teacher=teacher)
    weights_from, notice = "", None
    if config.checkpoint is not None:
        weights_from = load_checkpoint(
            model,
            config.checkpoint,
            weights=config.checkpoint_weights,
            key=config.checkpoint_key,
            model_name=config.model,
        )
    elif not config.pretrained:
        notice = small_image_notice(config.model, preprocess.size)
    probe_student(config, model, preprocess, num_classes=num_classes)
    return Student(model, preprocess, weights_from, notice or "")


def choose_preprocess(
    config: StudentConfig, model: nn.Module, *, view_size: int, teacher: Preprocess | None
) -> Preprocess:
    """Choose the preprocessing of a student.

    Mean and standard deviation are taken from the train file, else from the pretrained weights,
    else from the teacher, else they are 0.5.
    """
    own: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    if config.mean is not None and config.std is not None:
        mean, std = config.mean, config.std
    elif config.pretrained and "mean" in own and "std" in own:
        mean, std = own["mean"], own["std"]
    elif teacher is not None:
        mean, std = teacher.mean, teacher.std
    return Preprocess(
        size=config.input_size or view_size,
        mean=_per_channel(mean, config.channels),
        std=_per_channel(std, config.channels),
        interpolation=config.interpolation,
    )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """As many numbers as the input has channels: of three their average, of one that one."""
    if len(values) == channels:
        return values
    return (round(sum(values) / len(values), 6),) * channels


def restore_student(payload: dict[str, Any], config: StudentConfig) -> Student:
    """Load the student of a checkpoint to the CPU. Uses the weight average if it has one.

    Raises:
        ConfigError: the weights do not fit the model, because its code has changed.
    """
    model = create_model(config.model, num_classes=payload["num_classes"], **config.model_args)
    try:
        model.load_state_dict(payload["ema"] if payload["ema"] is not None else payload["model"])
    except RuntimeError as problem:
        raise ConfigError(
            f"the checkpoint's weights do not fit {config.model}: its code has changed since."
        ) from problem
    read_student(config, model)
    return Student(model, Preprocess.model_validate(payload["preprocess"]))


def choose_device(name: str) -> torch.device:
    """Return the device of this machine for `auto`, `cpu`, `cuda` or a name such as `cuda:1`.

    Raises:
        ConfigError: this machine does not have the GPU.
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
    """Exponential moving average (EMA) of the weights of a network.

    Each update computes `average = decay * average + (1 - decay) * weights`. Running statistics of
    batch norm are averaged like weights; integer buffers, such as counters, are copied. The average
    starts at the initial weights, so the run should be much longer than 1 / (1 - decay) updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the model's current weights."""
        averages: list[Tensor] = []
        weights: list[Tensor] = []
        # A state dict lists a tensor that two layers share twice, so it would be averaged twice.
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
        step: number of batches trained.
        totals: means over the current epoch.
        last: scores of the last evaluation.
        best: scores of the evaluation with the best top-1. It is selected on the evaluation set, so
            it overestimates the accuracy on new data.
        best_epoch: number of completed epochs at `best`.
    """

    step: int = 0
    totals: EpochTotals = field(default_factory=EpochTotals)
    last: Evaluation | None = None
    best: Evaluation | None = None
    best_epoch: int | None = None

    def note(self, evaluation: Evaluation, epoch: int) -> None:
        """Add the scores after a number of completed epochs."""
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
"""Name of the only student of a train file without `students`."""

AMP_TYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StudentState:
    """One student and its training state.

    Attributes:
        name: name of the student, unique in the run.
        config: complete settings of the student, as a train file with one student has them.
        model: network on the device.
        preprocess: preprocessing of its input.
        optimizer: optimizer of its parameters.
        scaler: scaler of float16 gradients; disabled for other number types.
        average: average of its weights, if `ema` is set.
        predictions: its predictions for each sample, if its method requires them.
        history: progress and scores.
        about: texts on its start, for people: which `weights` of a checkpoint, and a `notice`.
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
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> MethodSettings:
        """Settings of its method."""
        return self.config.method

    @property
    def kept_model(self) -> nn.Module:
        """The network to evaluate and export: the weight average, or the model without `ema`."""
        return self.model if self.average is None else self.average.model

    @property
    def learning_rate(self) -> float:
        """Learning rate of the latest update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def autocast(self, device: torch.device) -> torch.autocast:
        """Context that sets the number type of its forward passes."""
        amp = self.config.amp
        return torch.autocast(device.type, AMP_TYPES[amp], enabled=amp != "none")

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores."""
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
            ConfigError: the state belongs to another network, although the settings are equal.
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
    """Create the student of a train file and check it against the stream, without reading rows.

    Raises:
        ConfigError: model, method and settings do not fit each other.
        UnsupportedError: the model does not support the method.
    """
    facts = stream.facts
    student = make_student(
        config.student,
        num_classes=facts.num_classes,
        view_size=facts.view_size,
        # With several teachers, the preprocessing of the first is the default.
        teacher=facts.teachers[0].preprocess if facts.teachers else None,
        seed=config.seed,
    )
    model = student.model.to(device).train()
    if config.channels_last:
        require_channels_last(config.student, model, student.preprocess)
        model = model.to(memory_format=torch.channels_last)
    method_of(config.method).check(
        config.method,
        RunFacts(
            facts.teachers,
            model,
            facts.num_classes,
            student.preprocess.size,
            mixes=facts.mixes,
            channels=student.preprocess.channels,
        ),
    )
    average = None if config.ema is None else WeightAverage(model, config.ema)
    if config.compile:
        compile_backbone(model)
    return StudentState(
        name=name,
        config=config,
        model=model,
        preprocess=student.preprocess,
        about={"weights": student.weights_from, "notice": student.notice},
        optimizer=make_optimizer(config.optimizer, model),
        scaler=torch.amp.GradScaler(device.type, enabled=config.amp == "float16"),
        average=average,
        predictions=PredictionHistory(
            config.out, num_samples=facts.plan.num_samples, num_classes=facts.num_classes
        )
        if requirements_of(config.method).prediction_history
        else None,
    )


def compile_backbone(model: nn.Module) -> None:
    """Compile the part of a network up to its feature map, in place. Its state dict stays the same.

    That part is nearly the whole network, and every method runs it: also those that replace the map
    by its cells, which hooks in compiled code could not do.

    Raises:
        UnsupportedError: the network has no such part of its own.
    """
    if not is_cell_net(model):
        raise UnsupportedError(
            f"compile needs a network with forward_features and forward_head, as timm's have; "
            f"{describe(model)} has not.",
            hint="Use a network of timm or of this project, or leave compile out.",
        )
    # One code for each size of a batch: code for any size is slower, and there are few sizes.
    from torch._dynamo import config  # takes seconds to import

    # torch gives up after 8 codes of one function; each student and each size of a batch counts.
    config.recompile_limit = MAX_CODES
    model.forward_features = torch.compile(model.forward_features, dynamic=False)
