"""The preprocessing of a teacher's input: from settings, its checkpoint, or its metadata."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data.config import resolve_model_data_config
from torch import nn

from cache_service.errors import ConfigError
from cache_service.format.spec import Preprocess
from cache_service.models.preprocess import recorded_preprocess
from cache_service.teacher.settings import TeacherConfig


def resolve_preprocess(config: TeacherConfig, model: nn.Module, *, view_size: int) -> Preprocess:
    """The teacher's preprocessing.

    Settings of the build file come first, then what the checkpoint names, then the metadata of the
    model, then ImageNet's statistics; for a network of one channel, their average. Checkpoints of
    students that this project trained name their preprocessing, because under another one the
    network would be worse. The size in the metadata is that of the published weights. It is used
    for those weights and for networks that take no other size; with your own checkpoint, the
    network is fed views of their own size.

    Raises:
        ConfigError: the metadata is for images other than square ones, or of other channels.
    """
    recorded = recorded_preprocess(config.checkpoint) if config.checkpoint is not None else None
    if recorded is not None:
        settings = {name: getattr(config, name) for name in ("mean", "std", "interpolation")}
        settings["size"] = config.input_size
        if config.channels != recorded.channels and config.mean is None:
            raise ConfigError(
                f"checkpoint {config.checkpoint} is of a network for {recorded.channels} channels, "
                f"and teacher.channels is {config.channels}.",
                hint=f"Set teacher.channels: {recorded.channels}.",
            )
        return recorded.model_copy(
            update={name: value for name, value in settings.items() if value is not None}
        )
    described: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]  # timm's
    interpolation = described["interpolation"] if metadata_of(model) else "bilinear"
    if interpolation not in ("bilinear", "bicubic"):
        interpolation = "bicubic"  # the nearest to lanczos and random, which torch does not have
    mean, std = (
        _per_channel(described[name], config.channels, model=config.model)
        for name in ("mean", "std")
    )
    return Preprocess(
        size=config.input_size or _described_size(config, model) or view_size,
        mean=config.mean or mean,
        std=config.std or std,
        interpolation=config.interpolation or interpolation,
    )


def _per_channel(values: Sequence[float], channels: int, *, model: str) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    if channels == 1:
        return (round(sum(values) / len(values), 6),)
    raise ConfigError(
        f"teacher {model} is described for {len(values)} channels; views have 3.",
        hint="Set teacher.channels: 1 if it takes grey images, or teacher.mean and teacher.std.",
    )


def _described_size(config: TeacherConfig, model: nn.Module) -> int | None:
    """Side of the images that the model needs, px; None if it takes any."""
    metadata = metadata_of(model)
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


def metadata_of(model: nn.Module) -> dict[str, Any]:
    """What timm knows of the network's published weights; empty for other networks."""
    found: Any = getattr(model, "pretrained_cfg", None)
    return dict(found) if found else {}
