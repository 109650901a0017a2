"""The network that learns, and what it sees of a view."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from cache_service.errors import ConfigError
from cache_service.format.spec import Preprocess
from cache_service.models.create import create_model
from distill.config import StudentConfig

HALF = (0.5, 0.5, 0.5)
"""Mean and spread where nobody says otherwise: views come out in -1 to 1."""


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
    """What happens to a view before the student sees it.

    Mean and spread are those given, else those that pretrained weights were trained with, else the
    teacher's, else 0.5.
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
            f"device: {name} was asked for; this machine has {torch.cuda.device_count()} GPUs that "
            "torch can use.",
            hint="Use `--set device=auto`.",
        )
    return device
