"""Logits of the cells of a network's feature map.

A cell's logits are the network's own head, applied to the mean of the feature map over that cell.
`cell_logits` and `cell_features` compute them. Which module makes the map and what the head is are
measured on random inputs (`check_cells`, `linear_head`), not looked up in a list of architectures.

There are two ways to replace the map by its cells: timm's `forward_features` and `forward_head`, or
hooks on the module that makes the map, which `feature_map` finds by measuring in any other network.

Shape letters: B batch, R cells, N = B * R rows, C classes, D channels, K channels of an image, H W
sides of an image or map, L tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm

from cache_service.errors import KdCacheError, UnsupportedError
from cache_service.models.answers import ask, describe, reader_of
from cache_service.models.feature_map import (
    SCALE_ONE_HINT,
    Cut,
    Layout,
    Pool,
    find_cut,
    not_square,
    run_cut,
)
from cache_service.models.probe import Fed, anchor_of, probing, random_like, where_it_failed

Pooling = Literal["direct", "chained"]

CUT = "_kd_cache_cut"
"""Attribute of a network that keeps where its map ends, once that was measured."""

HeadFunction = Callable[[Tensor], Tensor]
"""Pooled rows [N, D] -> what the head makes of them, [N, C]."""

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
    model: nn.Module, images_BKHW: Tensor, scales: Sequence[int], *, pooling: Pooling = "direct"
) -> Tensor:
    """Logits of every cell, [B, R, C], from one run of the backbone. Differentiable.

    With scales (1,) this is the plain forward, which any network can do.

    Raises:
        UnsupportedError: the network has no single square map, or its output is not logits.
    """
    if tuple(scales) == (1,):
        return ask(model, images_BKHW).unsqueeze(1)
    logits_NC = answer_cells(
        model, images_BKHW, lambda map_BDHW: pool_cells(map_BDHW, scales, pooling=pooling)
    )
    return logits_NC.reshape(len(images_BKHW), -1, logits_NC.shape[1])


def cell_features(
    model: nn.Module, images_BKHW: Tensor, scales: Sequence[int], *, pooling: Pooling = "direct"
) -> Tensor:
    """Pooled features of every cell, [B, R, D].

    Where `linear_head` gives (W, b), the cell's logits are `W f + b`.
    """
    return pool_cells(_feature_map(model, images_BKHW), scales, pooling=pooling)


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


def answer_cells(model: nn.Module, images_BKHW: Tensor, pool: Pool) -> Tensor:
    """Logits [N, C] of the cells that `pool` makes of the map; the backbone runs once.

    Raises:
        UnsupportedError: the network has no map that can be found, or it is not square.
    """
    cut = _cut_of(model, images_BKHW)
    if cut is not None:
        return run_cut(model, images_BKHW, pool, cut)
    assert is_cell_net(model)  # else there is a cut
    features = model.forward_features(images_BKHW)
    rows_ND = pool(_as_map(model, features, images_BKHW)).flatten(0, 1)
    answer = model.forward_head(_as_pixels(model, rows_ND, _layout_of(model, features)))
    return reader_of(model).read(answer)


def _cut_of(model: Any, images_BKHW: Tensor) -> Cut | None:
    """Where the map ends; None if the network says so itself by timm's convention."""
    known: Cut | None = getattr(model, CUT, None)
    if known is not None:
        return known
    if is_cell_net(model):
        return None
    with probing(model):
        return measure_cut(model, random_like(images_BKHW.detach(), 2, *images_BKHW.shape[1:]))


def measure_cut(
    model: nn.Module, images_BKHW: Tensor, *, module: str | None = None, fed: str | None = None
) -> Cut:
    """Find where the map of a network in evaluation mode ends, and keep it for `answer_cells`.

    Args:
        model: any network.
        images_BKHW: random images, to measure with.
        module: name of the module that makes the map, if not to be found.
        fed: name of the module that is fed the map's mean, if not to be found.

    Raises:
        ConfigError: there is no such module.
        UnsupportedError: see `find_cut`.
    """
    answer_BC = ask(model, images_BKHW)

    def agrees(cut: Cut) -> bool:
        maps: list[Tensor] = []

        def keep(map_BDHW: Tensor) -> Tensor:
            maps.append(map_BDHW)
            return pool_cells(map_BDHW, (1,))

        def logits(rows_ND: Tensor) -> Tensor:
            return run_cut(model, images_BKHW[:1], lambda _: rows_ND[None], cut)

        try:
            run_cut(model, images_BKHW, keep, cut)
            return _measure(logits, maps[0], answer_BC)[0]
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001 - what follows the map may not take its cells, whatever that raises
            return False

    cut = find_cut(model, images_BKHW, agrees=agrees, module=module, fed=fed)
    object.__setattr__(
        model, CUT, cut
    )  # not as a module's own, so that any class of module takes it
    return cut


def is_cell_net(model: object) -> TypeGuard[Any]:
    """Whether the network follows timm's convention, as your own may to say where its map ends.

    `forward_features` maps images to a map [B, D, H, W], [B, H, W, D] or [B, L, D], and
    `forward_head` a map of any size to logits [B, C].
    """
    return all(callable(getattr(model, f"forward_{part}", None)) for part in ("features", "head"))


def _layout_of(model: nn.Module, features: object) -> Layout:
    """Where the channels of the output of `forward_features` are."""
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise UnsupportedError(
            f"{describe(model)} has no single feature map: forward_features answers "
            f"{type(features).__name__}.",
            hint=SCALE_ONE_HINT,
        )
    if features.ndim == 3:
        return "NLC"
    return "NHWC" if getattr(model, "output_fmt", "NCHW") == "NHWC" else "NCHW"


def _as_map(model: nn.Module, features: Tensor, images_BKHW: Tensor) -> Tensor:
    """The output of `forward_features` as [B, D, H, W], without prefix tokens."""
    layout = _layout_of(model, features)
    if layout == "NLC":
        tokens_BLD = features[:, _num_prefix_tokens(model) :]
        side = math.isqrt(tokens_BLD.shape[1])
        # 4 x 9 tokens would pass for 6 x 6: only square images have a square grid for certain.
        square = side * side == tokens_BLD.shape[1]
        if not square or images_BKHW.shape[-1] != images_BKHW.shape[-2]:
            raise not_square(model, f"{tokens_BLD.shape[1]} tokens", images_BKHW)
        return tokens_BLD.transpose(1, 2).reshape(len(tokens_BLD), -1, side, side)
    map_BDHW = features.permute(0, 3, 1, 2) if layout == "NHWC" else features
    height, width = map_BDHW.shape[-2:]
    if height != width:
        raise not_square(model, f"{height} x {width}", images_BKHW)
    return map_BDHW


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


# Measuring what a network's head is: pooling and a classifier, affine, linear, or something else.


def name_map(
    model: nn.Module, fed: Fed, *, feature_map: str | None, classifier: str | None
) -> None:
    """Find the map with the names that a config file gives, if it gives any; see `measure_cut`."""
    if feature_map is not None or classifier is not None:
        with probing(model):
            measure_cut(model, fed.images(anchor_of(model)), module=feature_map, fed=classifier)


def check_cells(
    model: nn.Module, input_size: int, *, channels: int = 3, trains: bool = False
) -> CellSupport:
    """Prove on random images that the head on the map's mean answers as the network does.

    Args:
        model: the network, in any mode; it is left as it was.
        input_size: side in px of the images that it will be fed.
        channels: of these images.
        trains: whether it will be trained, so that batch norm must not mix cells.

    Raises:
        UnsupportedError: names the network and why it has no cells.
    """
    with probing(model):
        images_BKHW = random_like(anchor_of(model), 2, channels, input_size, input_size)
        answer_BC = _plain_answer(model, images_BKHW)
        if _cut_of(model, images_BKHW) is None and not _follows_convention(model, images_BKHW):
            refusal = _not_pooled(model)
            try:
                measure_cut(model, images_BKHW)
            except UnsupportedError:
                raise refusal from None
        map_BDHW = _feature_map(model, images_BKHW)
        if trains:
            _require_cells_apart(model, images_BKHW)

        def logits(rows_ND: Tensor) -> Tensor:
            return answer_cells(model, images_BKHW[:1], lambda _: rows_ND[None])

        measured = [_measure(logits, map_BDHW, answer_BC)]
        if _has_pre_logits(model):
            # Any head would pass while the classifier is still zero: measure in front of it too.
            before, whole_BD = _head_before_classifier(model, images_BKHW)
            measured.append(_measure(before, map_BDHW, whole_BD))
    if not all(agrees for agrees, _ in measured):
        raise _not_pooled(model)
    affine = all(affine for _, affine in measured)
    return CellSupport(map_BDHW.shape[2], map_BDHW.shape[1], affine)


def _rows_of_norms(model: nn.Module, run: Callable[[], object]) -> dict[str, list[int]]:
    """How many rows every batch norm is fed, by name, in each of its calls."""
    rows: dict[str, list[int]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):

            def note(_module: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                rows.setdefault(name, []).append(len(inputs[0]))

            handles.append(module.register_forward_pre_hook(note))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return rows


def _has_pre_logits(model: Any) -> bool:
    if not is_cell_net(model) or getattr(model, CUT, None) is not None:
        return False
    return "pre_logits" in inspect.signature(model.forward_head).parameters


def _follows_convention(model: Any, images_BKHW: Tensor) -> bool:
    """Whether `forward_head` of `forward_features` is what the network answers."""
    try:
        features = model.forward_features(images_BKHW)
        answer = reader_of(model).read(model.forward_head(features))
        return bool(torch.allclose(answer, ask(model, images_BKHW), rtol=1e-3, atol=1e-5))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - methods of these names may mean anything
        return False


def _require_cells_apart(model: nn.Module, images_BKHW: Tensor) -> None:
    """Refuse batch norm behind the pooling: in training it would mix whole images and cells."""
    whole = _rows_of_norms(model, lambda: ask(model, images_BKHW))
    cells = _rows_of_norms(
        model,
        lambda: answer_cells(model, images_BKHW, lambda map_BDHW: pool_cells(map_BDHW, (1, 2))),
    )
    mixing = [name for name, rows in cells.items() if rows != whole.get(name)]
    if mixing:
        raise UnsupportedError(
            f"{describe(model)} cannot be trained by cells: its batch norm {mixing[0]} comes after "
            "the pooling, and would take its statistics over whole images and cells together.",
            hint="Use a method without cells, such as kd, or a network without it.",
        )


def linear_head(
    model: nn.Module, *, input_size: int = 96, channels: int = 3
) -> tuple[Tensor, Tensor] | None:
    """(weight [C, D], bias [C]) where logits = W f + b on pooled cells, else None.

    The network's linear layers are proposed, and one is accepted only if it predicts what the head
    answers to random features. ConvNeXt (a norm in front) and MobileNetV3 (a hidden layer) give
    None.

    Args:
        model: the network, in any mode; it is left as it was.
        input_size: px, for networks that must be run to reach their head (torchvision's).
        channels: of its input.
    """
    for layer in _linear_layers(model):
        if not bool(layer.weight.any()):
            continue  # zeros, a classifier before training, agree with whatever is in front of them
        weight_CD = layer.weight.detach().flatten(1)
        bias_C = weight_CD.new_zeros(len(weight_CD)) if layer.bias is None else layer.bias.detach()
        image_1KHW = random_like(weight_CD, 1, channels, input_size, input_size)
        with probing(model):
            for rows_ND, logits_NC in _head_answers(model, weight_CD, image_1KHW):
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
    features_ND = random_like(map_BDHW, count, map_BDHW.shape[1])
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


def _head_before_classifier(model: Any, images_BKHW: Tensor) -> tuple[HeadFunction, Tensor]:
    """timm's head without its classifier, and what it makes of the whole map."""
    features = model.forward_features(images_BKHW)
    layout = _layout_of(model, features)

    def before(rows_ND: Tensor) -> Tensor:
        answer: Tensor = model.forward_head(_as_pixels(model, rows_ND, layout), pre_logits=True)
        return answer.flatten(1)

    whole: Tensor = model.forward_head(features, pre_logits=True)
    return before, whole.flatten(1)


def _head_answers(
    model: nn.Module, weight_CD: Tensor, image_1KHW: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random features and the head's answers to them, in each layout that it may read."""
    if is_cell_net(model) and getattr(model, CUT, None) is None:
        rows_ND = random_like(weight_CD, NUM_FEATURES, weight_CD.shape[1])
        layouts: tuple[Layout, ...] = ("NCHW", "NLC")
        for layout in ("NHWC",) if getattr(model, "output_fmt", "") == "NHWC" else layouts:
            try:
                answer: Tensor = model.forward_head(_as_pixels(model, rows_ND, layout))
            except (RuntimeError, IndexError):
                continue  # the head reads another layout
            yield rows_ND, answer
        return
    try:
        map_BDHW = _feature_map(model, image_1KHW)
    except (UnsupportedError, RuntimeError):
        return
    if map_BDHW.shape[1] == weight_CD.shape[1]:
        rows_ND = _features_like(map_BDHW, NUM_FEATURES)
        yield rows_ND, answer_cells(model, image_1KHW, lambda _: rows_ND[None])


def _linear_layers(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """The classifier that the network names, else what may be one, the last layer first."""
    get_classifier = getattr(model, "get_classifier", None)
    named = get_classifier() if callable(get_classifier) else None
    layers = [named] if isinstance(named, nn.Module) else [*model.modules()][::-1]
    return [
        layer
        for layer in layers
        if isinstance(layer, nn.Linear)
        or (isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.kernel_size == (1, 1))
    ]


def _feature_map(model: nn.Module, images_BKHW: Tensor) -> Tensor:
    kept: list[Tensor] = []

    def pool(map_BDHW: Tensor) -> Tensor:
        kept.append(map_BDHW)
        return pool_cells(map_BDHW, (1,))

    answer_cells(model, images_BKHW, pool)
    return kept[0]


def _plain_answer(model: nn.Module, images_BKHW: Tensor) -> Tensor:
    size = images_BKHW.shape[-1]
    try:
        answer_BC = ask(model, images_BKHW)
    except (torch.OutOfMemoryError, KdCacheError):
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{describe(model)} cannot be fed {size} x {size} px images: {where_it_failed(error)}",
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
