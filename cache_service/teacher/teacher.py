"""Loads a teacher by name and lets it answer views.

Shape letters: B batch, R stored cells, C classes, D channels, H W pixels of a view.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from cache_service.errors import ConfigError, UnsupportedError, UntrainedTeacherError
from cache_service.format.canonical import canonical_json
from cache_service.format.cells import choose_stored_scales
from cache_service.format.codecs import Head
from cache_service.format.spec import Preprocess, TeacherId
from cache_service.models.create import TIMM_SOURCES, create_model
from cache_service.models.features import cell_features, cell_logits, check_cells, linear_head
from cache_service.models.preprocess import prepare_views, recorded_preprocess
from cache_service.models.weights import load_checkpoint
from cache_service.models.weights_digest import weights_sha256
from cache_service.teacher.settings import TeacherConfig

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A network in evaluation mode, its identity, and the cells that must be stored of it."""

    id: TeacherId
    stored_scales: tuple[int, ...]
    head: Head | None
    """The linear layer behind `features`, float32; None where features were not asked for."""
    device: torch.device
    channels_last: bool
    run_logits: Callable[[Tensor], Tensor] = field(repr=False)
    run_features: Callable[[Tensor], Tensor] = field(repr=False)
    weights_from: str = ""
    """Which weights were loaded, for people."""

    def answer(self, views_BHW3: Tensor) -> NDArray[np.float32]:
        """Raw logits [B, R, C] of uint8 views on the CPU. They may be non-finite."""
        return self._run(self.run_logits, views_BHW3)

    def features(self, views_BHW3: Tensor) -> NDArray[np.float32]:
        """Pooled input [B, R, D] of the linear head: logits = features @ weight.T + bias.

        Raises:
            UnsupportedError: the teacher was loaded without `want_features`.
        """
        if self.head is None:
            raise UnsupportedError(f"teacher {self.id.model} was loaded for logits, not features.")
        return self._run(self.run_features, views_BHW3)

    def _run(self, network: Callable[[Tensor], Tensor], views_BHW3: Tensor) -> NDArray[np.float32]:
        images_B3HW = prepare_views(
            views_BHW3, self.id.preprocess, device=self.device, channels_last=self.channels_last
        )
        with torch.inference_mode(), exact_kernels(), self._autocast():
            answers = network(images_B3HW)
        numbers: NDArray[np.float32] = answers.float().cpu().numpy()
        return numbers

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        dtype = AUTOCAST.get(self.id.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)


@contextlib.contextmanager
def exact_kernels() -> Iterator[None]:
    """Convolutions of full float32 precision that give the same result at every run.

    By default cuDNN computes float32 convolutions with 10-bit mantissas (TF32), which changes
    logits by more than float16 storage does, and may choose kernels by the load of the GPU.
    """
    with torch.backends.cudnn.flags(
        enabled=True,
        benchmark=False,
        deterministic=True,
        allow_tf32=False,
        fp32_precision="ieee",
    ):
        yield


def load_teacher(
    config: TeacherConfig,
    *,
    scales: Sequence[int],
    num_classes: int,
    view_size: int,
    device: str,
    want_features: bool = False,
    store_all: bool = False,
) -> Teacher:
    """Create the teacher and prove that it gives the logits of the requested cells.

    Args:
        config: `teacher:` of a build file.
        scales: grid sides of the cells; (1,) needs nothing of the network but logits.
        num_classes: of the dataset.
        view_size: side of the recorded views, px.
        device: such as cpu or cuda:1.
        want_features: for the `features` codec, which needs a linear head.
        store_all: for the `topk` codec, whose coarser cells cannot be derived from finer ones.

    Raises:
        ConfigError: name, checkpoint, number of classes, input size or device do not fit.
        UnsupportedError: the network has no cells, or no linear head where one is needed.
        UntrainedTeacherError: the settings name no weights.
    """
    target = _check_settings(config, device)
    model, weights_from = _create(config, num_classes)
    needs_map = tuple(scales) != (1,) or want_features
    identity = _identify(config, model, num_classes, view_size, needs_map=needs_map)
    stored = tuple(scales)
    if not store_all:
        stored = choose_stored_scales(
            stored,
            map_side=identity.map_side,
            affine_head=identity.affine_head,
            chained=config.pooling == "chained",
        )
    head = _linear_head(config, model, identity.preprocess.size) if want_features else None
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device=target, memory_format=layout)  # type: ignore[call-overload]  # torch's stub has no such overload

    def run_logits(images_B3HW: Tensor) -> Tensor:
        return cell_logits(model, images_B3HW, stored, pooling=config.pooling)

    def run_features(images_B3HW: Tensor) -> Tensor:
        return cell_features(model, images_B3HW, stored, pooling=config.pooling)

    if config.compile:
        run_logits, run_features = torch.compile(run_logits), torch.compile(run_features)
    return Teacher(
        identity,
        stored,
        head,
        target,
        config.channels_last,
        run_logits,
        run_features,
        weights_from,
    )


def _check_settings(config: TeacherConfig, device: str) -> torch.device:
    """The device, after the checks that need nothing loaded."""
    weights_known = config.pretrained or config.checkpoint or _is_factory(config.model)
    if not weights_known and not config.allow_untrained:
        raise UntrainedTeacherError(
            f"teacher {config.model} has random weights: neither teacher.checkpoint nor "
            "teacher.pretrained is set.",
            hint="To record it all the same, set teacher.allow_untrained: true.",
        )
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not known.", hint="Use cpu or cuda.") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: torch finds no GPU here.", hint="Use device cpu.")
    if config.precision == "float16" and target.type == "cpu":
        raise ConfigError(
            "teacher.precision: float16 needs a GPU.", hint="Use bfloat16 or float32 on a CPU."
        )
    return target


def _create(config: TeacherConfig, num_classes: int) -> tuple[nn.Module, str]:
    """The network in evaluation mode, on the CPU, and which weights it has, for people."""
    outputs = config.num_classes or num_classes
    model = create_model(
        config.model,
        num_classes=outputs,
        pretrained=config.pretrained,
        # Random weights must be the same ones when a build is resumed, so they always have a seed.
        seed=config.seed or 0,
        **config.model_args,
    )
    weights_from = "published weights" if config.pretrained else "the model's own weights"
    if config.checkpoint is not None:
        try:
            weights_from = load_checkpoint(
                model, config.checkpoint, weights=config.checkpoint_weights
            )
        except ConfigError as error:
            origin = "teacher.num_classes" if config.num_classes else "the dataset's classes"
            raise ConfigError(
                f"teacher {config.model} with {outputs} outputs ({origin}): {error.message}",
                hint=error.hint,
            ) from error
    return model.eval().requires_grad_(False), weights_from


def _identify(
    config: TeacherConfig, model: nn.Module, num_classes: int, view_size: int, *, needs_map: bool
) -> TeacherId:
    """What the cache keeps about the teacher, measured on the network itself."""
    digest = weights_sha256(model)  # before the first run, which may leave tensors behind
    preprocess = resolve_preprocess(config, model, view_size=view_size)
    num_outputs = _count_outputs(config, model, preprocess.size)
    _check_outputs(config, model, num_outputs=num_outputs, num_classes=num_classes)
    support = check_cells(model, preprocess.size) if needs_map else None
    return TeacherId(
        model=_portable_name(config),
        weights_sha256=digest,
        num_classes=num_outputs,
        preprocess=preprocess,
        precision=config.precision,
        map_side=support.map_side if support else None,
        affine_head=support.affine if support else False,
        pooling=config.pooling,
    )


def _count_outputs(config: TeacherConfig, model: nn.Module, size: int) -> int:
    """Logits of one image. They are counted, because metadata may name another number."""
    try:
        with torch.no_grad():
            logits_B1C = cell_logits(model, torch.zeros(1, 3, size, size), (1,))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"teacher {config.model} cannot be fed {size} x {size} px images: {reason}",
            hint="Set teacher.input_size to the size that it was made for.",
        ) from error
    return logits_B1C.shape[2]


def _check_outputs(
    config: TeacherConfig, model: nn.Module, *, num_outputs: int, num_classes: int
) -> None:
    published = _metadata(model).get("num_classes", num_outputs)
    if config.pretrained and published != num_outputs:
        raise ConfigError(
            f"teacher {config.model} is published with {published} classes; its head for "
            f"{num_outputs} would be random weights.",
            hint="Set teacher.checkpoint to weights for this dataset.",
        )
    if num_outputs < num_classes:
        hint = "Use a teacher of this dataset."
    elif num_outputs > num_classes and config.num_classes != num_outputs:
        hint = (
            f"If the first {num_classes} are the dataset's, set teacher.num_classes: {num_outputs}."
        )
    else:
        return
    raise ConfigError(
        f"teacher {config.model} answers {num_outputs} classes and the dataset has {num_classes}.",
        hint=hint,
    )


def _linear_head(config: TeacherConfig, model: nn.Module, input_size: int) -> Head:
    parameters = linear_head(model, input_size=input_size)
    if parameters is None:
        raise UnsupportedError(
            f"codec features needs a head that is one linear layer on the pooled map; that of "
            f"teacher {config.model} is more than that.",
            hint="Use codec dense, int8 or topk.",
        )
    weight_CD, bias_C = (values.float().numpy().copy() for values in parameters)
    return Head(weight_CD, bias_C)


def _is_factory(name: str) -> bool:
    return ":" in name and not name.startswith(TIMM_SOURCES)


def _portable_name(config: TeacherConfig) -> str:
    """The model's name in the cache: no folder of a file, but the constructor's arguments."""
    name = config.model
    if _is_factory(name):
        module, _, function = name.rpartition(":")
        name = f"{Path(module).name}:{function}"
    return name + (canonical_json(config.model_args).decode() if config.model_args else "")


def resolve_preprocess(config: TeacherConfig, model: nn.Module, *, view_size: int) -> Preprocess:
    """The teacher's preprocessing.

    Settings of the build file come first, then what the checkpoint names, then the metadata of the
    model, then ImageNet's statistics. Checkpoints of students that this project trained name their
    preprocessing, because under another one the network would be worse. The size in the metadata is
    that of the published weights. It is used for those weights and for networks that take no other
    size; with your own checkpoint, the network is fed views of their own size.

    Raises:
        ConfigError: the metadata is for images other than square RGB ones.
    """
    recorded = recorded_preprocess(config.checkpoint) if config.checkpoint is not None else None
    if recorded is not None:
        settings = {name: getattr(config, name) for name in ("mean", "std", "interpolation")}
        settings["size"] = config.input_size
        return recorded.model_copy(
            update={name: value for name, value in settings.items() if value is not None}
        )
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


def _described_size(config: TeacherConfig, model: nn.Module) -> int | None:
    """Side of the images that the model needs, px; None if it takes any."""
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
