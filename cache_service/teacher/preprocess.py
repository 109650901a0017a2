"""What a teacher wants to be fed: from the build file, else from the model's own metadata."""

from __future__ import annotations

from typing import Any

from timm.data.config import resolve_model_data_config
from torch import nn

from cache_service.errors import ConfigError
from cache_service.format.spec import Preprocess
from cache_service.models.preprocess import recorded_preprocess
from cache_service.teacher.config import TeacherConfig


def resolve_preprocess(config: TeacherConfig, model: nn.Module, *, view_size: int) -> Preprocess:
    """Settings of the build file first, then what the checkpoint says of itself, then the model's
    metadata, then ImageNet's statistics.

    A student that this project trained says what it was fed: recorded as a teacher it must be fed
    the same, or it is another, worse network. The size in the metadata is that of the published
    weights. It is followed for those weights and for networks that take no other size; one's own
    checkpoint is fed views as they are.

    Raises:
        ConfigError: the metadata asks for what a square RGB view cannot give.
    """
    recorded = recorded_preprocess(config.checkpoint) if config.checkpoint is not None else None
    if recorded is not None:
        return recorded.model_copy(update=_explicit(config))
    described: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]  # timm's
    interpolation = described["interpolation"] if _metadata(model) else "bilinear"
    if interpolation not in ("bilinear", "bicubic"):
        interpolation = "bicubic"  # the nearest to lanczos and random, which torch does not have
    mean, std = described["mean"], described["std"]
    if len(mean) != 3 or len(std) != 3:
        raise ConfigError(
            f"teacher {config.model} is described for {len(mean)} channels; views have 3."
        )
    return Preprocess(
        size=config.input_size or _described_size(config, model) or view_size,
        mean=config.mean or tuple(mean),
        std=config.std or tuple(std),
        interpolation=config.interpolation or interpolation,
    )


def _explicit(config: TeacherConfig) -> dict[str, Any]:
    given = {
        "size": config.input_size,
        "mean": config.mean,
        "std": config.std,
        "interpolation": config.interpolation,
    }
    return {name: value for name, value in given.items() if value is not None}


def _described_size(config: TeacherConfig, model: nn.Module) -> int | None:
    """The one side that the model must be fed, px; None where it takes any."""
    metadata = _metadata(model)
    if not (config.pretrained or metadata.get("fixed_input_size")):
        return None
    if "img_size" in config.model_args:  # timm's argument that moves a fixed size
        sides = config.model_args["img_size"]
    else:
        sides = metadata.get("input_size", (3, None))[1:]
    distinct = {sides} if isinstance(sides, int) else set(sides)
    if len(distinct) != 1:
        raise ConfigError(
            f"teacher {config.model} is described for {'x'.join(map(str, sides))} px; views are "
            "square.",
            hint="Set teacher.input_size.",
        )
    return distinct.pop()


def _metadata(model: nn.Module) -> dict[str, Any]:
    found: Any = getattr(model, "pretrained_cfg", None)
    return dict(found) if found else {}
