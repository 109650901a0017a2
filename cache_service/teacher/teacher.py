"""Loads a teacher by name and lets it answer views.

Shape letters: B batch, R stored cells, C classes, D channels, H W pixels of a view.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cache_service.errors import ConfigError, UnsupportedError, UntrainedTeacherError
from cache_service.format.canonical import canonical_json
from cache_service.format.cells import choose_stored_scales
from cache_service.format.codecs import Head
from cache_service.format.spec import TeacherId
from cache_service.human_format import one_line
from cache_service.models.answers import ask
from cache_service.models.create import TIMM_SOURCES, create_model
from cache_service.models.features import (
    cell_features,
    cell_logits,
    check_cells,
    linear_head,
    name_map,
)
from cache_service.models.preprocess import prepare_views
from cache_service.models.probe import Fed
from cache_service.models.weights import load_checkpoint
from cache_service.models.weights_digest import weights_sha256
from cache_service.teacher.classes import choose_outputs, require_outputs
from cache_service.teacher.fitting import fit_answers, fit_input
from cache_service.teacher.preprocessing import metadata_of, resolve_preprocess
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
    run_whole: Callable[[Tensor], Tensor] = field(repr=False)
    """All outputs for the whole image, also those that are not recorded."""
    weights_from: str = ""
    """Which weights were loaded, for people."""

    def answer(self, views_BHW3: Tensor) -> NDArray[np.float32]:
        """Raw logits [B, R, C] of uint8 views on the CPU. They may be non-finite."""
        return _to_numpy(self.answer_on_device(views_BHW3))

    def answer_on_device(self, views_BHW3: Tensor) -> Tensor:
        """Raw logits [B, R, C] of uint8 views, on the teacher's device and in its precision."""
        return self._run(self.run_logits, views_BHW3)

    def features(self, views_BHW3: Tensor) -> NDArray[np.float32]:
        """Pooled input [B, R, D] of the linear head: logits = features @ weight.T + bias.

        Raises:
            UnsupportedError: the teacher was loaded without `want_features`.
        """
        if self.head is None:
            raise UnsupportedError(f"teacher {self.id.model} was loaded for logits, not features.")
        return _to_numpy(self._run(self.run_features, views_BHW3))

    def answer_whole(self, views_BHW3: Tensor) -> NDArray[np.float32]:
        """Logits [B, C] of all outputs for the whole image, where `answer` has the chosen ones."""
        return _to_numpy(self._run(self.run_whole, views_BHW3))

    def _run(self, network: Callable[[Tensor], Tensor], views_BHW3: Tensor) -> Tensor:
        images_B3HW = prepare_views(
            views_BHW3, self.id.preprocess, device=self.device, channels_last=self.channels_last
        )
        with torch.no_grad(), exact_kernels(), self._autocast():
            return network(images_B3HW)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        dtype = AUTOCAST.get(self.id.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)


def _to_numpy(answers: Tensor) -> NDArray[np.float32]:
    """Answers on the CPU, float32. This waits for the device."""
    numbers: NDArray[np.float32] = answers.float().cpu().numpy()
    return numbers


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
    class_names: Sequence[str] = (),
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
        class_names: of the dataset, by label, for `teacher.classes` by names.
        want_features: for the `features` codec, which needs a linear head.
        store_all: for the `topk` codec, whose coarser cells cannot be derived from finer ones.

    Raises:
        ConfigError: name, checkpoint, number of classes, input size or device do not fit.
        UnsupportedError: the network has no cells, or no linear head where one is needed, or it
            answers no logits.
        UntrainedTeacherError: the settings name no weights.
    """
    target = _check_settings(config, device)
    outputs = choose_outputs(config, class_names=class_names, num_classes=num_classes)
    model, weights_from = _create(config, None if outputs else num_classes)
    needs_map = tuple(scales) != (1,) or want_features
    identity, fed = _identify(
        config, model, outputs, num_classes=num_classes, view_size=view_size, needs_map=needs_map
    )
    stored = tuple(scales)
    if not store_all:
        stored = choose_stored_scales(
            stored,
            map_side=identity.map_side,
            affine_head=identity.affine_head,
            chained=config.pooling == "chained",
        )
    head = _linear_head(config, model, fed, outputs) if want_features else None
    layout = torch.channels_last if fed.channels_last else torch.contiguous_format
    model.to(device=target, memory_format=layout)  # type: ignore[call-overload]  # torch's stub has no such overload
    run_logits, run_features = _runs(config, model, stored, outputs, target)
    return Teacher(
        identity,
        stored,
        head,
        target,
        fed.channels_last,
        run_logits,
        run_features,
        partial(ask, model),
        weights_from,
    )


def _runs(
    config: TeacherConfig,
    model: nn.Module,
    stored: tuple[int, ...],
    outputs: tuple[int, ...] | None,
    target: torch.device,
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Functions of network input: logits of the chosen outputs, and pooled features."""
    chosen = None if outputs is None else torch.tensor(outputs, device=target)

    def run_logits(images_BKHW: Tensor) -> Tensor:
        logits_BRC = cell_logits(model, images_BKHW, stored, pooling=config.pooling)
        return logits_BRC if chosen is None else logits_BRC[..., chosen]

    def run_features(images_BKHW: Tensor) -> Tensor:
        return cell_features(model, images_BKHW, stored, pooling=config.pooling)

    if config.compile:
        return torch.compile(run_logits), torch.compile(run_features)
    return run_logits, run_features


def _identify(
    config: TeacherConfig,
    model: nn.Module,
    outputs: tuple[int, ...] | None,
    *,
    num_classes: int,
    view_size: int,
    needs_map: bool,
) -> tuple[TeacherId, Fed]:
    """What the cache keeps about the teacher, measured on the network, and what it is fed."""
    digest = weights_sha256(model)  # before the first run, which may leave tensors behind
    preprocess = resolve_preprocess(config, model, view_size=view_size)
    fed = fit_input(config, model, preprocess)
    num_outputs = fit_answers(config, model, fed)
    _check_outputs(config, model, outputs, num_outputs=num_outputs, num_classes=num_classes)
    support = None
    if needs_map:
        name_map(model, fed, feature_map=config.feature_map, classifier=config.classifier)
        support = check_cells(model, fed.size, channels=fed.channels)
    identity = TeacherId(
        model=_portable_name(config),
        weights_sha256=digest,
        num_classes=num_outputs if outputs is None else len(outputs),
        preprocess=preprocess,
        precision=config.precision,
        map_side=support.map_side if support else None,
        affine_head=support.affine if support else False,
        pooling=config.pooling,
        classes=outputs,
        output=config.output,
        answers=config.answers or "logits",
        feature_map=config.feature_map if needs_map else None,
    )
    return identity, fed


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


def _create(config: TeacherConfig, num_classes: int | None) -> tuple[nn.Module, str]:
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
                model,
                config.checkpoint,
                weights=config.checkpoint_weights,
                key=config.checkpoint_key,
                model_name=config.model,
            )
        except ConfigError as error:
            origin = "teacher.num_classes" if config.num_classes else "the dataset's classes"
            origin = f" with {outputs} outputs ({origin})" if outputs else ""
            raise ConfigError(
                f"teacher {config.model}{origin}: {error.message}", hint=error.hint
            ) from error
    for parameter in model.parameters():  # TorchScript has no requires_grad_ of a module
        parameter.requires_grad_(False)
    try:
        return model.eval(), weights_from
    except NotImplementedError as error:
        raise UnsupportedError(
            f"teacher {config.model} cannot be put into evaluation mode: {one_line(error)}",
            hint="Make the network itself, or its TorchScript, rather than an exported program.",
        ) from error


def _check_outputs(
    config: TeacherConfig,
    model: nn.Module,
    outputs: tuple[int, ...] | None,
    *,
    num_outputs: int,
    num_classes: int,
) -> None:
    published = metadata_of(model).get("num_classes", num_outputs)
    if config.pretrained and published != num_outputs:
        raise ConfigError(
            f"teacher {config.model} is published with {published} classes; its head for "
            f"{num_outputs} would be random weights.",
            hint="Set teacher.checkpoint to weights for this dataset, or choose some of its "
            "outputs with teacher.classes.",
        )
    if outputs is not None:
        require_outputs(outputs, who=f"teacher {config.model}", num_outputs=num_outputs)
        return
    if num_outputs < num_classes:
        hint = "Use a teacher of this dataset."
    elif num_outputs > num_classes and config.num_classes != num_outputs:
        hint = (
            "Say which outputs are the dataset's with teacher.classes, by index, file or name; or, "
            f"if they are the first {num_classes}, set teacher.num_classes: {num_outputs}."
        )
    else:
        return
    raise ConfigError(
        f"teacher {config.model} answers {num_outputs} classes and the dataset has {num_classes}.",
        hint=hint,
    )


def _linear_head(
    config: TeacherConfig, model: nn.Module, fed: Fed, outputs: tuple[int, ...] | None
) -> Head:
    parameters = linear_head(model, input_size=fed.size, channels=fed.channels)
    if parameters is None:
        raise UnsupportedError(
            f"codec features needs a head that is one linear layer on the pooled map; that of "
            f"teacher {config.model} is more than that.",
            hint="Use codec dense, int8 or topk.",
        )
    chosen = slice(None) if outputs is None else list(outputs)
    weight_CD, bias_C = (values[chosen].float().numpy().copy() for values in parameters)
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
