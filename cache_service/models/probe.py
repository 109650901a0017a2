"""Measures what a network's head is: pooling and a classifier, affine, linear, or something else.

Shape letters: B batch, N rows, C classes, D channels, H W sides of an image or map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cache_service.errors import UnsupportedError
from cache_service.models.heads import (
    SCALE_ONE_HINT,
    Layout,
    answer_cells,
    as_pixels,
    describe,
    is_cell_net,
    layout_of,
    num_prefix_tokens,
    reads_pre_logits,
    require_logits,
)
from cache_service.models.pooling import pool_cells
from cache_service.models.weights import one_line

Head = Callable[[Tensor], Tensor]
"""Pooled rows [N, D] -> what the head makes of them, [N, C]."""

AFFINE_PROBES = (1.0, 1.0, 30.0, 30.0)
"""Sizes of the random features: a head that is curved may look straight near zero."""

NUM_FEATURES = 8
"""Random features by which a linear head is recognized."""

DEVICE_TOLERANCE = 1e-2
"""Relative; GPUs round the factors of a convolution to 10 bits (TF32). A head that is not what it
is taken for is off by about 1, so nothing is lost."""


@dataclass(frozen=True)
class CellSupport:
    """What `check_cells` found out about a network."""

    map_side: int
    num_channels: int
    affine: bool
    """Whether the mean of two cells' logits is the logits of their mean, so that coarse cells
    follow from fine ones."""


def check_cells(model: nn.Module, input_size: int) -> CellSupport:
    """Prove on random images that the head on the map's mean answers as the network does.

    Args:
        model: the network, in any mode; it is left as it was.
        input_size: side in px of the images that it will be fed.

    Raises:
        UnsupportedError: names the network and why it has no cells.
    """
    with _probing(model):
        images_B3HW = _random(_anchor(model), 2, 3, input_size, input_size)
        answer_BC = _plain_answer(model, images_B3HW)
        map_BDHW = _feature_map(model, images_B3HW)

        def logits(rows_ND: Tensor) -> Tensor:
            return answer_cells(model, images_B3HW[:1], lambda _: rows_ND[None])

        found = [_measure(logits, map_BDHW, answer_BC)]
        if reads_pre_logits(model):
            # Where the classifier still is zero any head would pass: look in front of it as well.
            before, whole_BD = _head_before_classifier(model, images_B3HW)
            found.append(_measure(before, map_BDHW, whole_BD))
    if not all(agrees for agrees, _ in found):
        raise _not_pooled(model)
    affine = all(affine for _, affine in found)
    return CellSupport(map_BDHW.shape[2], map_BDHW.shape[1], affine)


def linear_head(model: nn.Module, *, input_size: int = 96) -> tuple[Tensor, Tensor] | None:
    """(weight [C, D], bias [C]) where logits = W f + b on pooled cells, else None.

    The network's last linear layer is proposed, and kept only if it predicts what the head answers
    to random features. ConvNeXt (a norm in front) and MobileNetV3 (a hidden layer) give None.

    Args:
        model: the network, in any mode; it is left as it was.
        input_size: px, for networks that must be run to reach their head (torchvision's).
    """
    layer = _last_linear(model)
    if layer is None or not bool(layer.weight.any()):
        return None  # zeros, a classifier before training, agree with whatever is in front of them
    weight_CD = layer.weight.detach().flatten(1)
    bias_C = weight_CD.new_zeros(len(weight_CD)) if layer.bias is None else layer.bias.detach()
    with _probing(model):
        for rows_ND, found_NC in _head_answers(model, weight_CD, input_size):
            if _close(found_NC, rows_ND @ weight_CD.T + bias_C, bias_C):
                return weight_CD, bias_C
    return None


def _measure(head: Head, map_BDHW: Tensor, wanted_BC: Tensor) -> tuple[bool, bool]:
    """Whether the head answers the map's mean as wanted, and whether it is affine."""
    mean_BD = pool_cells(map_BDHW, (1,))[:, 0]
    count = len(AFFINE_PROBES)
    sizes_N1 = mean_BD.new_tensor(AFFINE_PROBES)[:, None]
    a_ND, b_ND = (_features_like(map_BDHW, 2 * count) * sizes_N1.repeat(2, 1)).chunk(2)
    rows_ND = torch.cat([mean_BD, torch.zeros_like(mean_BD[:1]), a_ND, b_ND, (a_ND + b_ND) / 2])
    parts = [len(mean_BD), 1, count, count, count]
    found, zero, at_a, at_b, between = torch.split(head(rows_ND), parts)
    return _close(found, wanted_BC, zero), _close(between, (at_a + at_b) / 2, zero)


def _features_like(map_BDHW: Tensor, count: int) -> Tensor:
    """Random features [N, D] of the map's sign: a head may rectify what is never negative."""
    features_ND = _random(map_BDHW, count, map_BDHW.shape[1])
    return features_ND.abs() if bool((map_BDHW >= 0).all()) else features_ND


def _close(found_NC: Tensor, wanted_NC: Tensor, origin_C: Tensor) -> bool:
    """Whether two answers agree, by the part of each row that depends on the features."""
    if found_NC.shape != wanted_NC.shape:
        return False
    eps = torch.finfo(wanted_NC.dtype).eps
    relative = max(eps**0.5, 0.0 if wanted_NC.device.type == "cpu" else DEVICE_TOLERANCE)
    spread_N = (wanted_NC - origin_C).abs().amax(dim=1)
    rounding_N = 8 * eps * wanted_NC.abs().amax(dim=1)
    off_N = (found_NC - wanted_NC).abs().amax(dim=1)
    return bool((off_N <= relative * spread_N + rounding_N).all())


def _head_before_classifier(model: nn.Module, images_B3HW: Tensor) -> tuple[Head, Tensor]:
    """timm's head without its classifier, and what it makes of the whole map."""
    features = model.forward_features(images_B3HW)  # type: ignore[operator]  # checked by caller
    layout = layout_of(model, features)

    def before(rows_ND: Tensor) -> Tensor:
        pixels = as_pixels(model, rows_ND, layout)
        answer: Tensor = model.forward_head(pixels, pre_logits=True)  # type: ignore[operator]  # as above
        return answer.flatten(1)

    whole: Tensor = model.forward_head(features, pre_logits=True)  # type: ignore[operator]  # as above
    return before, whole.flatten(1)


def _head_answers(
    model: nn.Module, weight_CD: Tensor, input_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random features and the head's answers to them, in each layout that it may read."""
    if is_cell_net(model):
        rows_ND = _random(weight_CD, NUM_FEATURES, weight_CD.shape[1])
        layouts: tuple[Layout, ...] = ("NCHW", "NLC")
        for layout in ("NHWC",) if getattr(model, "output_fmt", "") == "NHWC" else layouts:
            try:
                answer: Tensor = model.forward_head(as_pixels(model, rows_ND, layout))
            except (RuntimeError, IndexError):
                continue  # the head reads another layout
            yield rows_ND, answer
        return
    image_13HW = _random(weight_CD, 1, 3, input_size, input_size)
    try:
        map_BDHW = _feature_map(model, image_13HW)
    except (UnsupportedError, RuntimeError):
        return
    if map_BDHW.shape[1] == weight_CD.shape[1]:
        rows_ND = _features_like(map_BDHW, NUM_FEATURES)
        yield rows_ND, answer_cells(model, image_13HW, lambda _: rows_ND[None])


def _last_linear(model: nn.Module) -> nn.Linear | nn.Conv2d | None:
    """The classifier that the network names, else its last linear layer."""
    name_it = getattr(model, "get_classifier", None)
    named = name_it() if callable(name_it) else None
    if isinstance(named, nn.Linear) or (isinstance(named, nn.Conv2d) and named.groups == 1):
        return named
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return layers[-1] if layers else None


def _feature_map(model: nn.Module, images_B3HW: Tensor) -> Tensor:
    kept: list[Tensor] = []

    def pool(map_BDHW: Tensor) -> Tensor:
        kept.append(map_BDHW)
        return pool_cells(map_BDHW, (1,))

    answer_cells(model, images_B3HW, pool)
    return kept[0]


def _plain_answer(model: nn.Module, images_B3HW: Tensor) -> Tensor:
    size = images_B3HW.shape[-1]
    try:
        answer_BC = require_logits(model, model(images_B3HW))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise UnsupportedError(
            f"{describe(model)} cannot be fed {size} x {size} px images: {one_line(error)}",
            hint="Feed it the size that it was made for.",
        ) from error
    if not bool(answer_BC.isfinite().all()):
        raise UnsupportedError(
            f"{describe(model)} answers random {size} x {size} px images with numbers that are not "
            "finite.",
            hint="Check its weights, or use precision: float32.",
        )
    return answer_BC


def _not_pooled(model: nn.Module) -> UnsupportedError:
    if num_prefix_tokens(model) and getattr(model, "global_pool", "") == "token":
        reason = "it answers from its class token, not from the mean of its feature map"
    else:
        reason = (
            "its head is more than pooling and a classifier, so on the mean of its feature map it "
            "answers otherwise than on the map"
        )
    return UnsupportedError(f"{describe(model)} has no cells: {reason}.", hint=SCALE_ONE_HINT)


def _anchor(model: nn.Module) -> Tensor:
    """A tensor of the network's device and dtype."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))


def _random(anchor: Tensor, *shape: int) -> Tensor:
    """Normal numbers, the same in every run, of the anchor's device and dtype."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(anchor.device, anchor.dtype)


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, full precision, no gradients; every module's mode is put back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(_anchor(model).device.type, enabled=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
