"""A network cut where it pools its map: the map goes out, cells come back, its own head answers.

Two ways to cut: timm's `forward_features` / `forward_head`, or a hook at the one pooling layer, for
torchvision's networks and any other that pools in a module. Neither knows a network by heart,
except where torchvision pools in a function that no hook sees.

Shape letters: B batch, R cells, N = B * R rows, C classes, D channels, H W map sides, L tokens.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from cache_service.errors import UnsupportedError

Layout = Literal["NCHW", "NHWC", "NLC"]
Pool = Callable[[Tensor], Tensor]
"""map [B, D, H, W] -> cells [B, R, D]."""

SCALE_ONE_HINT = (
    "Ask for scales: [1], or choose a network that classifies the mean of its feature map, "
    "such as resnet50, convnext_tiny or resnet32x4."
)


@runtime_checkable
class CellNet(Protocol):
    """timm's convention, and how a network of your own says where its map ends."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> map, [B, D, H, W], [B, H, W, D] or [B, L, D]."""
        ...

    def forward_head(self, x: Tensor) -> Tensor:
        """A map of any size -> logits [B, C]."""
        ...


def is_cell_net(model: object) -> TypeGuard[Any]:
    """Whether the network can be cut by timm's convention."""
    return isinstance(model, CellNet)


def describe(model: nn.Module) -> str:
    """The network's name for messages: timm's where it has one, else its class."""
    cfg = getattr(model, "pretrained_cfg", None)
    named = cfg.get("architecture") if isinstance(cfg, dict) else None
    return str(named or type(model).__name__)


def answer_cells(model: nn.Module, images_B3HW: Tensor, pool: Pool) -> Tensor:
    """Logits [N, C] of the cells that `pool` makes of the map; the backbone runs once.

    Raises:
        UnsupportedError: the network has no map that can be reached, or it is not square.
    """
    if is_cell_net(model):
        features = model.forward_features(images_B3HW)
        rows_ND = pool(as_map(model, features, images_B3HW)).flatten(0, 1)
        logits_NC = model.forward_head(as_pixels(model, rows_ND, layout_of(model, features)))
    else:
        logits_NC = _answer_hooked(model, images_B3HW, pool)
    return require_logits(model, logits_NC)


def require_logits(model: nn.Module, answer: object) -> Tensor:
    """The answer, if it is one tensor [N, C]; networks with several heads answer more."""
    if isinstance(answer, Tensor) and answer.ndim == 2:
        return answer
    found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    raise UnsupportedError(
        f"{describe(model)} answers {found} where logits of shape (batch, classes) are needed.",
        hint="Wrap it in a module that returns its logits alone.",
    )


def layout_of(model: nn.Module, features: object) -> Layout:
    """Where the channels of `forward_features`' answer are."""
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UnsupportedError(
            f"{describe(model)} has no single feature map: forward_features answers {found}.",
            hint=SCALE_ONE_HINT,
        )
    if features.ndim == 3:
        return "NLC"
    return "NHWC" if getattr(model, "output_fmt", "NCHW") == "NHWC" else "NCHW"


def as_map(model: nn.Module, features: Tensor, images_B3HW: Tensor) -> Tensor:
    """`forward_features`' answer as [B, D, H, W]; prefix tokens are left out."""
    layout = layout_of(model, features)
    if layout == "NLC":
        tokens_BLD = features[:, num_prefix_tokens(model) :]
        side = math.isqrt(tokens_BLD.shape[1])
        # 4 x 9 tokens would pass for 6 x 6: only square images have a square grid for certain.
        square = side * side == tokens_BLD.shape[1]
        if not square or images_B3HW.shape[-1] != images_B3HW.shape[-2]:
            raise _not_square(model, f"{tokens_BLD.shape[1]} tokens", images_B3HW)
        return tokens_BLD.transpose(1, 2).reshape(len(tokens_BLD), -1, side, side)
    map_BDHW = features.permute(0, 3, 1, 2) if layout == "NHWC" else features
    return _require_square(model, map_BDHW, images_B3HW)


def as_pixels(model: nn.Module, rows_ND: Tensor, layout: Layout) -> Tensor:
    """Pooled rows as maps of one pixel, in the layout that the network's head reads."""
    if layout == "NCHW":
        return rows_ND[:, :, None, None]
    if layout == "NHWC":
        return rows_ND[:, None, None, :]
    # Zero prefix tokens: a head that reads its class token must fail the check, not pass the
    # whole image's answer off as every cell's.
    return pad(rows_ND[:, None, :], (0, 0, num_prefix_tokens(model), 0))


def num_prefix_tokens(model: nn.Module) -> int:
    """Class, distillation and register tokens ahead of the map's own."""
    return int(getattr(model, "num_prefix_tokens", 0))


def reads_pre_logits(model: nn.Module) -> bool:
    """Whether `forward_head` can also give the classifier's input, as timm's do."""
    return is_cell_net(model) and "pre_logits" in inspect.signature(model.forward_head).parameters


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

    The hook stays for this call only and acts in this thread only, so the network is left as it
    was and other threads may use it meanwhile.
    """
    cut, map_from = _cut(model)
    thread = threading.get_ident()
    num_calls = 0

    def replace(_cut: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        nonlocal num_calls
        if threading.get_ident() != thread:
            return None
        num_calls += 1
        map_BDHW = _require_square(model, map_from(inputs[0], output), images_B3HW)
        return pool(map_BDHW).flatten(0, 1)[:, :, None, None]

    handle = cut.register_forward_hook(replace)
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


def _cut(model: nn.Module) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
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


def _not_square(model: nn.Module, found: str, images_B3HW: Tensor) -> UnsupportedError:
    height, width = images_B3HW.shape[-2:]
    return UnsupportedError(
        f"cells need a square feature map; that of {describe(model)} is {found} for "
        f"{height} x {width} px images.",
        hint="Feed square images, or ask for scales: [1].",
    )
