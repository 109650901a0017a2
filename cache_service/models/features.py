"""Logits of the cells of a network's feature map.

A cell's logits are the network's own head, applied to the mean of the feature map over that cell.
`cell_logits` and `cell_features` compute them. Which module makes the map and what the head is are
measured on random inputs (`check_cells`, `linear_head`), not looked up in a list of architectures.

There are two ways to replace the map by its cells: timm's `forward_features` and `forward_head`, or
a hook on the one pooling layer, for torchvision's networks and others that pool in a module.

Shape letters: B batch, R cells, N = B * R rows, C classes, D channels, H W sides of an image or
map, L tokens.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from cache_service.errors import UnsupportedError
from cache_service.human_format import one_line

Pooling = Literal["direct", "chained"]
Layout = Literal["NCHW", "NHWC", "NLC"]
Pool = Callable[[Tensor], Tensor]
"""map [B, D, H, W] -> cells [B, R, D]."""

HeadFunction = Callable[[Tensor], Tensor]
"""Pooled rows [N, D] -> what the head makes of them, [N, C]."""

SCALE_ONE_HINT = (
    "Ask for scales: [1], or choose a network that classifies the mean of its feature map, "
    "such as resnet50, convnext_tiny or resnet32x4."
)

AFFINE_PROBES = (1.0, 1.0, 30.0, 30.0)
"""Sizes of the random features: a head that is curved may look straight near zero."""

NUM_FEATURES = 8
"""Random features by which a linear head is recognized."""

DEVICE_TOLERANCE = 1e-2
"""Relative; GPUs round the factors of a convolution to 10 bits (TF32). A head that is not what it
is taken for is off by about 1, so nothing is lost."""


class CellSupport(NamedTuple):
    """What `check_cells` measured: side and channels of the feature map, and the kind of head."""

    map_side: int
    num_channels: int
    affine: bool
    """Whether the mean of two cells' logits is the logits of their mean, so that coarse cells
    follow from fine ones."""


def cell_logits(
    model: nn.Module, images_B3HW: Tensor, scales: Sequence[int], *, pooling: Pooling = "direct"
) -> Tensor:
    """Logits of every cell, [B, R, C], from one run of the backbone. Differentiable.

    With scales (1,) this is the plain forward, which any network can do.

    Raises:
        UnsupportedError: the network has no single square map, or its output is not logits.
    """
    if tuple(scales) == (1,):
        return require_logits(model, model(images_B3HW)).unsqueeze(1)
    logits_NC = answer_cells(
        model, images_B3HW, lambda map_BDHW: pool_cells(map_BDHW, scales, pooling=pooling)
    )
    return logits_NC.reshape(len(images_B3HW), -1, logits_NC.shape[1])


def cell_features(
    model: nn.Module, images_B3HW: Tensor, scales: Sequence[int], *, pooling: Pooling = "direct"
) -> Tensor:
    """Pooled features of every cell, [B, R, D].

    Where `linear_head` gives (W, b), the cell's logits are `W f + b`.
    """
    return pool_cells(_feature_map(model, images_B3HW), scales, pooling=pooling)


def pool_cells(map_BDHW: Tensor, scales: Sequence[int], *, pooling: Pooling = "direct") -> Tensor:
    """Means of the map over the cells of all scales, [B, R, D], in the map's dtype.

    The windows are those of adaptive average pooling: they overlap by a pixel where the side does
    not divide the map's, and repeat where it exceeds it. Means are taken in float32 at least.

    Args:
        map_BDHW: feature map.
        scales: grid sides, in the order wanted.
        pooling: `direct` pools every scale from the map; `chained` pools the last (finest) one
            from the map and the others from that grid.

    Source: Wei et al., Scale Decoupled Distillation, CVPR 2024; `chained` is what the published
    code does with 4 as the finest side (it pools 4 x 4 first whatever the scales are), and differs
    from `direct` where the finest side does not divide the map's.
    """
    source = map_BDHW if pooling == "direct" else _pool_grid(map_BDHW, scales[-1])
    cells_BDR = torch.cat([_pool_grid(source, side).flatten(2) for side in scales], dim=2)
    return cells_BDR.transpose(1, 2).to(map_BDHW.dtype)


def _pool_grid(map_BDHW: Tensor, side: int) -> Tensor:
    """Adaptive mean pooling to [B, D, side, side].

    Written with plain means because the gradient of torch's adaptive pooling is not deterministic
    on GPUs.
    """
    if side == 1:
        # The reduction that networks do themselves, so that cell 0 is exactly their own logits.
        return map_BDHW.mean((2, 3), keepdim=True, dtype=_sum_dtype(map_BDHW))
    return _pool_axis(_pool_axis(map_BDHW, 2, side), 3, side)


def _pool_axis(map_BDHW: Tensor, axis: int, side: int) -> Tensor:
    dtype, length = _sum_dtype(map_BDHW), map_BDHW.shape[axis]
    if length % side == 0:
        shape = map_BDHW.shape
        blocks = map_BDHW.reshape(*shape[:axis], side, length // side, *shape[axis + 1 :])
        return blocks.mean(axis + 1, dtype=dtype)
    edges = [(i * length // side, -(-(i + 1) * length // side)) for i in range(side)]
    windows = [map_BDHW.narrow(axis, start, stop - start) for start, stop in edges]
    return torch.stack([window.mean(axis, dtype=dtype) for window in windows], dim=axis)


def _sum_dtype(map_BDHW: Tensor) -> torch.dtype:
    """A mean in two steps must not round to half precision between them."""
    return torch.promote_types(map_BDHW.dtype, torch.float32)


# Replacing a network's map by its cells.


def answer_cells(model: nn.Module, images_B3HW: Tensor, pool: Pool) -> Tensor:
    """Logits [N, C] of the cells that `pool` makes of the map; the backbone runs once.

    Raises:
        UnsupportedError: the network has no map that can be reached, or it is not square.
    """
    if is_cell_net(model):
        features = model.forward_features(images_B3HW)
        rows_ND = pool(_as_map(model, features, images_B3HW)).flatten(0, 1)
        logits_NC = model.forward_head(_as_pixels(model, rows_ND, _layout_of(model, features)))
    else:
        logits_NC = _answer_hooked(model, images_B3HW, pool)
    return require_logits(model, logits_NC)


def is_cell_net(model: object) -> TypeGuard[Any]:
    """Whether the network follows timm's convention, as your own may to say where its map ends.

    `forward_features` maps images to a map [B, D, H, W], [B, H, W, D] or [B, L, D], and
    `forward_head` a map of any size to logits [B, C].
    """
    return all(callable(getattr(model, f"forward_{part}", None)) for part in ("features", "head"))


def describe(model: nn.Module) -> str:
    """The network's name for messages: timm's where it has one, else its class."""
    cfg = getattr(model, "pretrained_cfg", None)
    named = cfg.get("architecture") if isinstance(cfg, dict) else None
    return str(named or type(model).__name__)


def require_logits(model: nn.Module, answer: object) -> Tensor:
    """The answer, if it is one tensor [N, C]; networks with several heads answer more."""
    if isinstance(answer, Tensor) and answer.ndim == 2:
        return answer
    raise UnsupportedError(
        f"{describe(model)} answers {_shape_or_type(answer)} where logits of shape (batch, "
        "classes) are needed.",
        hint="Wrap it in a module that returns its logits alone.",
    )


def _shape_or_type(answer: object) -> str:
    return str(tuple(answer.shape)) if isinstance(answer, Tensor) else type(answer).__name__


def _layout_of(model: nn.Module, features: object) -> Layout:
    """Where the channels of the output of `forward_features` are."""
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise UnsupportedError(
            f"{describe(model)} has no single feature map: forward_features answers "
            f"{_shape_or_type(features)}.",
            hint=SCALE_ONE_HINT,
        )
    if features.ndim == 3:
        return "NLC"
    return "NHWC" if getattr(model, "output_fmt", "NCHW") == "NHWC" else "NCHW"


def _as_map(model: nn.Module, features: Tensor, images_B3HW: Tensor) -> Tensor:
    """The output of `forward_features` as [B, D, H, W], without prefix tokens."""
    layout = _layout_of(model, features)
    if layout == "NLC":
        tokens_BLD = features[:, _num_prefix_tokens(model) :]
        side = math.isqrt(tokens_BLD.shape[1])
        # 4 x 9 tokens would pass for 6 x 6: only square images have a square grid for certain.
        square = side * side == tokens_BLD.shape[1]
        if not square or images_B3HW.shape[-1] != images_B3HW.shape[-2]:
            raise _not_square(model, f"{tokens_BLD.shape[1]} tokens", images_B3HW)
        return tokens_BLD.transpose(1, 2).reshape(len(tokens_BLD), -1, side, side)
    map_BDHW = features.permute(0, 3, 1, 2) if layout == "NHWC" else features
    return _require_square(model, map_BDHW, images_B3HW)


def _as_pixels(model: nn.Module, rows_ND: Tensor, layout: Layout) -> Tensor:
    """Pooled rows as maps of one pixel, in the layout that the network's head reads."""
    if layout == "NCHW":
        return rows_ND[:, :, None, None]
    if layout == "NHWC":
        return rows_ND[:, None, None, :]
    # Zero prefix tokens: a head that reads its class token must fail the check. With the image's
    # own tokens it would answer for the whole image in every cell.
    return pad(rows_ND[:, None, :], (0, 0, _num_prefix_tokens(model), 0))


def _num_prefix_tokens(model: nn.Module) -> int:
    """Class, distillation and register tokens in front of the map's own."""
    return int(getattr(model, "num_prefix_tokens", 0))


_MAP_MODULES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "torchvision.models.mobilenetv2.MobileNetV2": ("features", lambda map_BDHW: map_BDHW),
    "torchvision.models.shufflenetv2.ShuffleNetV2": ("conv5", lambda map_BDHW: map_BDHW),
    "torchvision.models.mnasnet.MNASNet": ("layers", lambda map_BDHW: map_BDHW),
    # Its forward rectifies the map before pooling; rectifying the cells again changes nothing.
    "torchvision.models.densenet.DenseNet": ("features", relu),
}
"""torchvision networks that pool in a function: the module that makes the map, and what follows."""


def _answer_hooked(model: nn.Module, images_B3HW: Tensor, pool: Pool) -> Tensor:
    """Run the network once, with the pooled map replaced by one-pixel maps of all cells.

    The hook exists for this call only and acts in this thread only, so the network is left as it
    was and other threads may use it meanwhile.
    """
    hooked, map_from = _find_pooling(model)
    thread = threading.get_ident()
    num_calls = 0

    def replace(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        nonlocal num_calls
        if threading.get_ident() != thread:
            return None
        num_calls += 1
        map_BDHW = _require_square(model, map_from(inputs[0], output), images_B3HW)
        return pool(map_BDHW).flatten(0, 1)[:, :, None, None]

    handle = hooked.register_forward_hook(replace)
    try:
        logits_NC: Tensor = model(images_B3HW)
    finally:
        handle.remove()
    if num_calls != 1:
        raise UnsupportedError(
            f"{describe(model)} ran its pooling layer {num_calls} times where 1 is needed.",
            hint="Compile the caller of cell_logits, not the network. " * (num_calls == 0)
            + SCALE_ONE_HINT,
        )
    return logits_NC


def _find_pooling(model: nn.Module) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The module to hook, and the map as a function of its input and output."""
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if kind in _MAP_MODULES:
        name, finish = _MAP_MODULES[kind]
        return model.get_submodule(name), lambda _, output: finish(output)
    pooling = getattr(model, "avgpool", None)
    if not isinstance(pooling, nn.Module):
        found = [m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
        if len(found) != 1:
            raise UnsupportedError(
                f"{describe(model)} has no forward_features and forward_head, no layer named "
                f"avgpool, and {len(found)} layers nn.AdaptiveAvgPool2d where 1 is needed, so its "
                "feature map cannot be found.",
                hint=SCALE_ONE_HINT,
            )
        pooling = found[0]

    def pooled(map_BDHW: Tensor, output: Tensor) -> Tensor:
        if output.shape[2:] != (1, 1):
            raise UnsupportedError(
                f"{describe(model)} pools its map to {tuple(output.shape[2:])}, not to one pixel: "
                "its head is more than pooling and a classifier.",
                hint=SCALE_ONE_HINT,
            )
        return map_BDHW

    return pooling, pooled


def _require_square(model: nn.Module, map_BDHW: Tensor, images_B3HW: Tensor) -> Tensor:
    height, width = map_BDHW.shape[-2:]
    if map_BDHW.ndim != 4 or height != width:
        raise _not_square(model, f"{height} x {width}", images_B3HW)
    return map_BDHW


def _not_square(model: nn.Module, measured: str, images_B3HW: Tensor) -> UnsupportedError:
    height, width = images_B3HW.shape[-2:]
    return UnsupportedError(
        f"cells need a square feature map; that of {describe(model)} is {measured} for "
        f"{height} x {width} px images.",
        hint="Feed square images, or ask for scales: [1].",
    )


# Measuring what a network's head is: pooling and a classifier, affine, linear, or something else.


def check_cells(model: nn.Module, input_size: int) -> CellSupport:
    """Prove on random images that the head on the map's mean answers as the network does.

    Args:
        model: the network, in any mode; it is left as it was.
        input_size: side in px of the images that it will be fed.

    Raises:
        UnsupportedError: names the network and why it has no cells.
    """
    with _probing(model):
        images_B3HW = _random_like(_anchor(model), 2, 3, input_size, input_size)
        answer_BC = _plain_answer(model, images_B3HW)
        map_BDHW = _feature_map(model, images_B3HW)

        def logits(rows_ND: Tensor) -> Tensor:
            return answer_cells(model, images_B3HW[:1], lambda _: rows_ND[None])

        measured = [_measure(logits, map_BDHW, answer_BC)]
        if is_cell_net(model) and "pre_logits" in inspect.signature(model.forward_head).parameters:
            # Any head would pass while the classifier is still zero: measure in front of it too.
            before, whole_BD = _head_before_classifier(model, images_B3HW)
            measured.append(_measure(before, map_BDHW, whole_BD))
    if not all(agrees for agrees, _ in measured):
        raise _not_pooled(model)
    affine = all(affine for _, affine in measured)
    return CellSupport(map_BDHW.shape[2], map_BDHW.shape[1], affine)


def linear_head(model: nn.Module, *, input_size: int = 96) -> tuple[Tensor, Tensor] | None:
    """(weight [C, D], bias [C]) where logits = W f + b on pooled cells, else None.

    The network's last linear layer is proposed, and accepted only if it predicts what the head
    answers to random features. ConvNeXt (a norm in front) and MobileNetV3 (a hidden layer) give
    None.

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
        for rows_ND, logits_NC in _head_answers(model, weight_CD, input_size):
            if _close(logits_NC, rows_ND @ weight_CD.T + bias_C, bias_C):
                return weight_CD, bias_C
    return None


def _measure(head: HeadFunction, map_BDHW: Tensor, expected_BC: Tensor) -> tuple[bool, bool]:
    """Whether the head answers the map's mean as expected, and whether it is affine."""
    mean_BD = pool_cells(map_BDHW, (1,))[:, 0]
    count = len(AFFINE_PROBES)
    sizes_N1 = mean_BD.new_tensor(AFFINE_PROBES)[:, None]
    a_ND, b_ND = (_features_like(map_BDHW, 2 * count) * sizes_N1.repeat(2, 1)).chunk(2)
    rows_ND = torch.cat([mean_BD, torch.zeros_like(mean_BD[:1]), a_ND, b_ND, (a_ND + b_ND) / 2])
    parts = [len(mean_BD), 1, count, count, count]
    at_mean, zero, at_a, at_b, between = torch.split(head(rows_ND), parts)
    return _close(at_mean, expected_BC, zero), _close(between, (at_a + at_b) / 2, zero)


def _features_like(map_BDHW: Tensor, count: int) -> Tensor:
    """Random features [N, D] of the map's sign: a head may rectify what is never negative."""
    features_ND = _random_like(map_BDHW, count, map_BDHW.shape[1])
    return features_ND.abs() if bool((map_BDHW >= 0).all()) else features_ND


def _close(answer_NC: Tensor, expected_NC: Tensor, origin_C: Tensor) -> bool:
    """Whether two answers agree, by the part of each row that depends on the features."""
    if answer_NC.shape != expected_NC.shape:
        return False
    eps = torch.finfo(expected_NC.dtype).eps
    relative = max(eps**0.5, 0.0 if expected_NC.device.type == "cpu" else DEVICE_TOLERANCE)
    range_N = (expected_NC - origin_C).abs().amax(dim=1)
    rounding_N = 8 * eps * expected_NC.abs().amax(dim=1)
    off_N = (answer_NC - expected_NC).abs().amax(dim=1)
    return bool((off_N <= relative * range_N + rounding_N).all())


def _head_before_classifier(model: Any, images_B3HW: Tensor) -> tuple[HeadFunction, Tensor]:
    """timm's head without its classifier, and what it makes of the whole map."""
    features = model.forward_features(images_B3HW)
    layout = _layout_of(model, features)

    def before(rows_ND: Tensor) -> Tensor:
        answer: Tensor = model.forward_head(_as_pixels(model, rows_ND, layout), pre_logits=True)
        return answer.flatten(1)

    whole: Tensor = model.forward_head(features, pre_logits=True)
    return before, whole.flatten(1)


def _head_answers(
    model: nn.Module, weight_CD: Tensor, input_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random features and the head's answers to them, in each layout that it may read."""
    if is_cell_net(model):
        rows_ND = _random_like(weight_CD, NUM_FEATURES, weight_CD.shape[1])
        layouts: tuple[Layout, ...] = ("NCHW", "NLC")
        for layout in ("NHWC",) if getattr(model, "output_fmt", "") == "NHWC" else layouts:
            try:
                answer: Tensor = model.forward_head(_as_pixels(model, rows_ND, layout))
            except (RuntimeError, IndexError):
                continue  # the head reads another layout
            yield rows_ND, answer
        return
    image_13HW = _random_like(weight_CD, 1, 3, input_size, input_size)
    try:
        map_BDHW = _feature_map(model, image_13HW)
    except (UnsupportedError, RuntimeError):
        return
    if map_BDHW.shape[1] == weight_CD.shape[1]:
        rows_ND = _features_like(map_BDHW, NUM_FEATURES)
        yield rows_ND, answer_cells(model, image_13HW, lambda _: rows_ND[None])


def _last_linear(model: nn.Module) -> nn.Linear | nn.Conv2d | None:
    """The classifier that the network names, else its last linear layer."""
    get_classifier = getattr(model, "get_classifier", None)
    named = get_classifier() if callable(get_classifier) else None
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
    if _num_prefix_tokens(model) and getattr(model, "global_pool", "") == "token":
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


def _random_like(anchor: Tensor, *shape: int) -> Tensor:
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
