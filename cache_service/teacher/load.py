"""Name -> frozen teacher: created, checked, described, put on its device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache_service.errors import ConfigError, UnsupportedError, UntrainedTeacherError
from cache_service.format.canonical import canonical_json
from cache_service.format.cells import choose_stored_scales
from cache_service.format.codecs import Head
from cache_service.format.spec import Preprocess, TeacherId
from cache_service.models.create import TIMM_SOURCES, create_model
from cache_service.models.features import cell_features, cell_logits, check_cells, linear_head
from cache_service.models.weights import load_checkpoint, weights_sha256
from cache_service.teacher.config import TeacherConfig
from cache_service.teacher.preprocess import resolve_preprocess
from cache_service.teacher.teacher import Teacher


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
    """Create the teacher and prove that it can answer what is asked of it.

    Args:
        scales: grid sides of the cells; (1,) asks nothing of the network but logits.
        num_classes: of the dataset.
        view_size: side of the recorded views, px.
        want_features: for the `features` codec, which needs a linear head.
        store_all: for the `topk` codec, whose coarser cells cannot be derived from finer ones.

    Raises:
        ConfigError: name, checkpoint, number of classes, input size or device do not fit.
        UnsupportedError: the network has no cells, or no linear head where one is needed.
        UntrainedTeacherError: nothing says where weights come from.
    """
    target = _check_settings(config, device)
    model, loaded = _create(config, num_classes)
    digest = weights_sha256(model)  # before the first run, which may leave tensors behind
    preprocess = resolve_preprocess(config, model, view_size=view_size)
    found = _count_classes(config, model, preprocess)
    _check_classes(config, model, found=found, wanted=num_classes)
    needs_map = tuple(scales) != (1,) or want_features
    support = check_cells(model, preprocess.size) if needs_map else None
    identity = TeacherId(
        model=_portable_name(config),
        weights_sha256=digest,
        num_classes=found,
        preprocess=preprocess,
        precision=config.precision,
        map_side=support.map_side if support else None,
        affine_head=support.affine if support else False,
        pooling=config.pooling,
    )
    stored = tuple(scales)
    if not store_all:
        stored = choose_stored_scales(
            stored,
            map_side=identity.map_side,
            affine_head=identity.affine_head,
            chained=config.pooling == "chained",
        )
    teacher = _place(config, model, identity, stored, target, want_features=want_features)
    return replace(teacher, weights_from=loaded)


def _check_settings(config: TeacherConfig, device: str) -> torch.device:
    """What can be refused before anything is loaded."""
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
    """The network in evaluation mode, on the CPU, and where its weights come from."""
    outputs = config.num_classes or num_classes
    model = create_model(
        config.model,
        num_classes=outputs,
        pretrained=config.pretrained,
        # Random weights must be the same ones when a build is resumed, so they always have a seed.
        seed=config.seed or 0,
        **config.model_args,
    )
    loaded = "published weights" if config.pretrained else "the model's own weights"
    if config.checkpoint is not None:
        try:
            loaded = load_checkpoint(model, config.checkpoint, weights=config.checkpoint_weights)
        except ConfigError as error:
            origin = "teacher.num_classes" if config.num_classes else "the dataset's classes"
            raise ConfigError(
                f"teacher {config.model} with {outputs} outputs ({origin}): {error.message}",
                hint=error.hint,
            ) from error
    return model.eval().requires_grad_(False), loaded


def _count_classes(config: TeacherConfig, model: nn.Module, preprocess: Preprocess) -> int:
    """Length of the answer to one image, which is what counts, whatever the metadata says."""
    size = preprocess.size
    try:
        with torch.no_grad():
            answer_B1C = cell_logits(model, torch.zeros(1, 3, size, size), (1,))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"teacher {config.model} cannot be fed {size} x {size} px images: {reason}",
            hint="Set teacher.input_size to the size that it was made for.",
        ) from error
    return answer_B1C.shape[2]


def _check_classes(config: TeacherConfig, model: nn.Module, *, found: int, wanted: int) -> None:
    metadata: Any = getattr(model, "pretrained_cfg", None) or {}
    published = metadata.get("num_classes", found) if config.pretrained else found
    if published != found:
        raise ConfigError(
            f"teacher {config.model} is published with {published} classes; its head for {found} "
            "would be random weights.",
            hint="Set teacher.checkpoint to weights for this dataset.",
        )
    if found < wanted:
        raise ConfigError(
            f"teacher {config.model} answers {found} classes and the dataset has {wanted}.",
            hint="Use a teacher of this dataset.",
        )
    if found > wanted and config.num_classes != found:
        raise ConfigError(
            f"teacher {config.model} answers {found} classes and the dataset has {wanted}.",
            hint=f"If the first {wanted} are the dataset's, set teacher.num_classes: {found}.",
        )


def _place(
    config: TeacherConfig,
    model: nn.Module,
    identity: TeacherId,
    stored: tuple[int, ...],
    device: torch.device,
    *,
    want_features: bool,
) -> Teacher:
    head = _find_head(config, model, identity.preprocess.size) if want_features else None
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]  # torch's stub has no such overload

    def run_logits(images_B3HW: Tensor) -> Tensor:
        return cell_logits(model, images_B3HW, stored, pooling=config.pooling)

    def run_features(images_B3HW: Tensor) -> Tensor:
        return cell_features(model, images_B3HW, stored, pooling=config.pooling)

    return Teacher(
        id=identity,
        stored_scales=stored,
        head=head,
        device=device,
        channels_last=config.channels_last,
        run_logits=torch.compile(run_logits) if config.compile else run_logits,
        run_features=torch.compile(run_features) if config.compile else run_features,
    )


def _find_head(config: TeacherConfig, model: nn.Module, input_size: int) -> Head:
    found = linear_head(model, input_size=input_size)
    if found is None:
        raise UnsupportedError(
            f"codec features needs a head that is one linear layer on the pooled map; that of "
            f"teacher {config.model} is more than that.",
            hint="Use codec dense, int8 or topk.",
        )
    weight_CD, bias_C = (values.float().numpy().copy() for values in found)
    return Head(weight_CD, bias_C)


def _is_factory(name: str) -> bool:
    return ":" in name and not name.startswith(TIMM_SOURCES)


def _portable_name(config: TeacherConfig) -> str:
    """The model as named, less the folder of a file, plus the arguments that shape it."""
    name = config.model
    if _is_factory(name):
        module, _, function = name.rpartition(":")
        name = f"{Path(module).name}:{function}"
    return name + (canonical_json(config.model_args).decode() if config.model_args else "")
