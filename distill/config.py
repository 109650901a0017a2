"""Configuration of a train file: student, data, method, optimizer and output folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from cache_service.config import (
    EXPANDED,
    Frozen,
    override_document,
    read_yaml,
    validate_config,
)
from cache_service.datasets import DatasetConfig
from cache_service.errors import ConfigError
from cache_service.format.recipe import AugmentConfig
from cache_service.format.seeds import Seeds
from cache_service.format.spec import OutputIndex, Sha256, without_later
from cache_service.remote.source import DEFAULT_DISK_BYTES
from cache_service.storage import is_bucket_url, is_server_url
from distill.methods import MethodConfig
from distill.optim import Constant, OptimizerConfig, ScheduleConfig

LATER = frozenset({"channels", "output", "feature_map", "classifier"})
"""Keys of `student` that checkpoints of earlier versions do not have."""

NEVER_PASSED_ON = frozenset({"channels", "output", "feature_map", "classifier"})
"""Keys about a network that its constructor may use as names of its own arguments."""

Unit = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(gt=0, le=1)]


class CacheConfig(Frozen):
    """A cache of recorded teacher logits."""

    url: Annotated[
        str, Field(min_length=1, description="A path, s3://... or http(s)://..."), EXPANDED
    ]
    fingerprint: Annotated[
        Sha256 | None, Field(description="Refuse a cache with another fingerprint.")
    ] = None
    wait_s: Annotated[
        float,
        Field(ge=0, le=86_400, description="Longest wait for rows not recorded yet, s."),
    ] = 0.0
    disk_cache: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Folder in which rows from a server, or objects of a bucket, are kept. By "
            "default ~/.cache/kd-cache for a bucket, and none for a server.",
        ),
        EXPANDED,
    ] = None
    disk_cache_bytes: Annotated[
        int,
        Field(ge=0, le=2**60, description="Largest size of `disk_cache`, bytes; 0 keeps nothing."),
    ] = DEFAULT_DISK_BYTES

    @model_validator(mode="after")
    def _check(self) -> CacheConfig:
        if self.disk_cache is None:
            return self
        if not (is_server_url(self.url) or is_bucket_url(self.url)):
            raise ValueError(f"disk_cache is for servers and buckets, and {self.url} is a folder")
        return self


def _as_cache(written: Any) -> Any:
    return {"url": written} if isinstance(written, str) else written


def _as_list(written: Any) -> Any:
    return [written] if isinstance(written, str | dict) else written


class StudentConfig(Frozen):
    """The network to train and the preprocessing of its input."""

    model: Annotated[
        str,
        Field(min_length=1, description="A timm name, torchvision/NAME or module:factory."),
        EXPANDED,
    ]
    num_classes: Annotated[
        int | None, Field(ge=2, description="Must equal the dataset's number of classes.")
    ] = None
    pretrained: Annotated[bool, Field(description="Start from the pretrained weights.")] = False
    checkpoint: Annotated[
        str | None,
        Field(min_length=1, description="Initial weights: .safetensors, .pt, .pth or a folder."),
        EXPANDED,
    ] = None
    checkpoint_weights: Annotated[
        Literal["raw", "averaged"] | None,
        Field(
            description="Which weights to load from a checkpoint with raw and averaged (EMA) ones."
        ),
    ] = None
    checkpoint_key: Annotated[
        str | None,
        Field(
            min_length=1,
            coerce_numbers_to_str=True,  # a list's item 1, as YAML reads it
            description="Which network of a checkpoint that holds several.",
        ),
    ] = None
    seed: Annotated[
        int | None,
        Field(ge=0, lt=2**31, description="Seed of the initial weights. Null: the run's seed."),
    ] = None
    model_args: dict[str, Any] = Field(
        default_factory=dict, description="Additional arguments of the model's constructor."
    )
    input_size: Annotated[
        int | None,
        Field(ge=8, le=4096, description="Side of the input, px. Null: the view's size."),
    ] = None
    channels: Annotated[
        Literal[1, 3], Field(description="Of the input; 1: views are converted to grey.")
    ] = 3
    mean: Annotated[
        tuple[Unit, ...] | None,
        Field(
            description="Per channel, 0 to 1. Null: as the pretrained weights, else the teacher."
        ),
    ] = None
    std: Annotated[
        tuple[Spread, ...] | None,
        Field(description="Standard deviation; required with `mean`."),
    ] = None
    interpolation: Annotated[
        Literal["bilinear", "bicubic"], Field(description="Used if the view must be resized.")
    ] = "bilinear"
    output: Annotated[
        OutputIndex | None,
        Field(description="Where the logits are in a tuple or mapping: an index or key, or mean."),
    ] = None
    feature_map: Annotated[
        str | None,
        Field(min_length=1, description="Module that makes the map of the cells, if not found."),
    ] = None
    classifier: Annotated[
        str | None,
        Field(min_length=1, description="Module that is fed the map's mean, if not found."),
    ] = None

    @model_validator(mode="after")
    def _check(self) -> StudentConfig:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std are given together or not at all")
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("student.pretrained and student.checkpoint both name its weights")
        for key in ("checkpoint_weights", "checkpoint_key"):
            if getattr(self, key) is not None and self.checkpoint is None:
                raise ValueError(f"student.{key} chooses within student.checkpoint: give it")
        for values in (self.mean, self.std):
            if values is not None and len(values) != self.channels:
                raise ValueError(
                    f"mean and std have {len(values)} numbers, and channels is {self.channels}: "
                    "give one number per channel"
                )
        own = {"name", *type(self).model_fields} - NEVER_PASSED_ON
        taken = sorted(self.model_args.keys() & own)
        if taken:
            raise ValueError(
                f"model_args cannot hold {taken[0]}: that is said by student's own keys"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_later(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Checkpoints store this section. Those of earlier versions can be resumed.
        return without_later(self, serialize(self), LATER)


def _none_if_false(written: Any) -> Any:
    return None if written is False else written


class EvaluateConfig(Frozen):
    """Evaluation of the student during training."""

    dataset: DatasetConfig
    every: Annotated[
        int, Field(ge=1, description="Epochs between evaluations; the last is always evaluated.")
    ] = 1
    augment: Annotated[
        AugmentConfig | None, Field(description="Null: resize and center crop, no random draws.")
    ] = None
    batch_size: Annotated[int | None, Field(ge=1, description="Null: the run's batch size.")] = None

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        if self.augment is not None and self.augment.repeats > 1:
            raise ValueError("augment.repeats must be 1 here: every sample is evaluated once")
        return self


class CheckpointEvery(Frozen):
    """How often to write `checkpoint.pt`. It is also written at the end and on Ctrl-C."""

    epochs: Annotated[int | None, Field(ge=1, description="Epochs between checkpoints.")] = None
    steps: Annotated[int | None, Field(ge=1, description="Batches between checkpoints.")] = None

    @model_validator(mode="after")
    def _check(self) -> CheckpointEvery:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give epochs or steps, one of them")
        return self


class ReplayConfig(Frozen):
    """Tolerance for differences between replayed views and the views that the teacher saw."""

    max_drift: Annotated[
        int, Field(ge=0, le=255, description="Largest accepted difference of a pixel, 0 to 255.")
    ] = 0


class TrainConfig(Frozen):
    """The settings of a train file."""

    dataset: DatasetConfig
    caches: Annotated[
        tuple[Annotated[CacheConfig, BeforeValidator(_as_cache)], ...],
        BeforeValidator(_as_list),
        Field(description="Caches of one or more teachers: paths, URLs or {url, fingerprint}."),
    ] = ()
    augment: Annotated[
        AugmentConfig | None, Field(description="Recipe of the views, for runs without caches.")
    ] = None
    seeds: Annotated[
        Seeds | None,
        Field(description="Null: all complete seeds; without caches, a new seed each epoch."),
    ] = None
    student: StudentConfig
    method: MethodConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = Constant()
    epochs: Annotated[
        int,
        Field(ge=1, le=100_000, description="Passes over the dataset; seeds are used in order."),
    ]
    batch_size: Annotated[int, Field(ge=1, le=2**20, description="Views per batch, on all ranks.")]
    accumulate: Annotated[int, Field(ge=1, le=2**16, description="Batches per update.")] = 1
    clip_grad_norm: Annotated[
        float | None, Field(gt=0, description="Largest joint norm of all gradients.")
    ] = None
    amp: Annotated[
        Literal["none", "bfloat16", "float16"],
        Field(description="Number type of the student's forward pass; losses are float32."),
    ] = "none"
    channels_last: Annotated[bool, Field(description="Use the channels-last memory format.")] = (
        False
    )
    compile: Annotated[
        Literal[True] | None,
        BeforeValidator(_none_if_false),
        Field(description="Whether to run the student through torch.compile."),
    ] = None
    ema: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Decay per update of an average of the weights (EMA)."),
    ] = None
    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="Weight distributed uniformly over all classes.")
    ] = 0.0
    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1, ...")
    ] = "auto"
    loader: Annotated[
        Literal["auto", "workers", "device"],
        Field(description="Make views in processes, or on the device if that is exact."),
    ] = "auto"
    workers: Annotated[int, Field(ge=0, le=256, description="Number of loader processes.")] = 2
    seed: Annotated[int, Field(ge=0, lt=2**31, description="Seed of weights, dropout.")] = 0
    out: Annotated[str, Field(min_length=1, description="Folder of all output files."), EXPANDED]
    evaluate: EvaluateConfig | None = None
    checkpoint_every: CheckpointEvery = CheckpointEvery(epochs=1)
    log_every: Annotated[int, Field(ge=1, description="Updates between lines of metrics.")] = 50
    replay: ReplayConfig = ReplayConfig()
    tensorboard: Annotated[bool, Field(description="Also write TensorBoard event files.")] = False
    wandb: Annotated[
        str | None,
        Field(min_length=1, max_length=128, description="Also report to this W&B project."),
    ] = None

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.caches and self.augment is not None:
            raise ValueError("augment is the cache's own recipe: leave it out where caches are")
        if not self.caches and self.augment is None:
            raise ValueError("without caches, augment must say what the views are")
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs={self.schedule.warmup_epochs:g} leaves nothing of "
                f"epochs={self.epochs}"
            )
        min_lr = getattr(self.schedule, "min_lr", 0.0)
        if min_lr > self.optimizer.lr:
            raise ValueError(
                f"schedule.min_lr={min_lr:g} is above optimizer.lr={self.optimizer.lr:g}"
            )
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load the train file at `path` and apply `a.b=value` overrides.

    Raises:
        ConfigError: a key is invalid. The message names the file and each such key.
    """
    return validate_config(TrainConfig, read_train_file(path, overrides), where=str(path))


def read_train_file(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a train file and apply overrides, without validation.

    A cache that is written as its URL alone, or alone in a list, has keys for them, too:
    `caches.url=http://...`, `caches.wait_s=600`.
    """
    document, caches = read_yaml(path), None
    keys = [override.partition("=")[0].split(".") for override in overrides]
    inside = [key[1] for key in keys if key[0] == "caches" and len(key) > 1]
    if any(not part.isdecimal() for part in inside):
        caches = document.get("caches")
        if isinstance(caches, list) and len(caches) == 1:
            caches = caches[0]
        if isinstance(caches, list):
            raise ConfigError(
                f"{path} has {len(caches)} caches, and --set caches.{inside[0]} does not say of "
                "which one.",
                hint=f"Write caches.0.{inside[0]}=..., counted from 0.",
            )
        document["caches"] = _as_cache(caches)
    elif inside:
        document["caches"] = [_as_cache(cache) for cache in _as_list(document.get("caches") or [])]
    return override_document(document, overrides)
