"""Finds the map whose mean a network classifies, by measuring, and runs the network on its cells.

Hooks record what every module answers to random images, and what it is fed. The map is the output
of the last module whose mean, over the pixels, another module is fed (or the network answers), so
that it does not matter how the network pools: in a module, in a function or by `mean`. A `Cut` says
where that is; `run_cut` runs the network with its cells instead of its map.

Shape letters: B batch, N rows, C classes, D channels, K channels of an image, H W sides of a map, L
tokens.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import pad

from cache_service.errors import ConfigError, UnsupportedError
from cache_service.models.answers import ask, describe, reader_of

Layout = Literal["NCHW", "NHWC", "NLC"]
Pool = Callable[[Tensor], Tensor]
"""map [B, D, H, W] -> cells [B, R, D]."""

SCALE_ONE_HINT = (
    "Ask for scales: [1], or choose a network that classifies the mean of its feature map, "
    "such as resnet50, convnext_tiny or resnet32x4."
)

FINISHES: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda map_BDHW: map_BDHW,
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "hardswish": functional.hardswish,
    "relu6": functional.relu6,
}
"""Functions that a network may apply to the output of a module before it pools."""

MAX_PREFIX = 5
"""Class, distillation and register tokens in front of a map that are looked for."""

MAX_TRIED = 64
"""Maps that are tried where several have a mean that is fed to a module, as those of
squeeze-and-excitation have."""

SMALLEST_POOLED = 64
"""Side of an image, px, from which a map of one pixel is the result of pooling, not a map."""


_Form = tuple[Layout, int, str]
"""Layout, prefix and finish: how an output is a map."""


class Cut(NamedTuple):
    """Where a network's map ends.

    Attributes:
        module: name of the module that makes the map, which runs once.
        finish: name in `FINISHES` of what follows before the pooling.
        layout: axes of its output.
        prefix: tokens in front of the map's own, for NLC.
        fed: name of the module that is fed the mean. None: the module's output can be replaced by
            maps of one pixel, so that whatever pools it does not matter.
    """

    module: str
    finish: str = ""
    layout: Layout = "NCHW"
    prefix: int = 0
    fed: str | None = None

    def as_map(self, output: Tensor) -> Tensor | None:
        """The module's output as a map [B, D, H, W]; None if it is none."""
        if output.ndim != (3 if self.layout == "NLC" else 4):
            return None
        if self.layout == "NLC":
            tokens_BLD = output[:, self.prefix :]
            side = math.isqrt(tokens_BLD.shape[1])
            if side == 0 or side * side != tokens_BLD.shape[1]:
                return None
            output = tokens_BLD.transpose(1, 2).reshape(len(tokens_BLD), -1, side, side)
        elif self.layout == "NHWC":
            output = output.permute(0, 3, 1, 2)
        return FINISHES[self.finish](output)

    def as_pixels(self, rows_ND: Tensor) -> Tensor:
        """Pooled rows as maps of one pixel, in the module's layout."""
        if self.layout == "NCHW":
            return rows_ND[:, :, None, None]
        if self.layout == "NHWC":
            return rows_ND[:, None, None, :]
        # Zeros for prefix tokens: a head that reads its class token must fail the check. With the
        # image's own tokens it would answer for the whole image in every cell.
        return pad(rows_ND[:, None, :], (0, 0, self.prefix, 0))


class _Call(NamedTuple):
    """What one module was fed and answered. Calls are listed in the order in which they ended.

    Attributes:
        name: of the module, which ran once.
        fed: its input [B, D] or [B, D, 1, 1]; None if it is another one.
        began: number of modules that had ended before it began.
        output: what it answered; a scalar if that was no tensor.
        version: of the output, which counts changes in place.
        means: of the output taken as a map, under two finishes, before anything could change it.
        pools: whether it only pools to one pixel.
    """

    name: str
    fed: Tensor | None
    began: int
    output: Tensor
    version: int
    means: dict[_Form, Tensor]
    pools: bool


class _Found(NamedTuple):
    """A map whose mean is fed to a module or answered, and its sides."""

    cut: Cut
    height: int
    width: int


def run_cut(network: nn.Module, images_BKHW: Tensor, pool: Pool, cut: Cut) -> Tensor:
    """Logits [N, C] of the cells that `pool` makes of the map. The network runs once.

    The hooks exist for this call only and act in this thread only, so the network is left as it
    was and other threads may use it meanwhile.

    Raises:
        UnsupportedError: the map is not square, or its module did not run exactly once.
    """
    thread, num_maps = threading.get_ident(), 0
    rows: list[Tensor] = []

    def replace(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor | None:
        nonlocal num_maps
        if threading.get_ident() != thread:
            return None
        num_maps += 1
        rows.append(pool(_require_square(network, cut, output, images_BKHW)).flatten(0, 1))
        return cut.as_pixels(rows[-1]) if cut.fed is None else None

    def feed(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != thread or not rows:
            return None
        rows_ND = rows[-1]
        return (rows_ND.reshape(*rows_ND.shape, *inputs[0].shape[2:]), *inputs[1:])

    with ExitStack() as stack:
        maker = network.get_submodule(cut.module)
        stack.callback(maker.register_forward_hook(replace).remove)
        if cut.fed is not None:
            reader = network.get_submodule(cut.fed)
            stack.callback(reader.register_forward_pre_hook(feed).remove)
        logits_NC = ask(network, images_BKHW)
    if num_maps != 1:
        raise UnsupportedError(
            f"{describe(network)} ran the module {cut.module} of its map {num_maps} times where 1 "
            "is needed.",
            hint="Compile the caller of cell_logits, not the network. " * (num_maps == 0)
            + SCALE_ONE_HINT,
        )
    return logits_NC


def _require_square(network: nn.Module, cut: Cut, output: Tensor, images_BKHW: Tensor) -> Tensor:
    map_BDHW = cut.as_map(output)
    height, width = images_BKHW.shape[-2:]
    # 4 x 9 tokens would pass for 6 x 6: only square images have a square grid for certain.
    if map_BDHW is None or (cut.layout == "NLC" and height != width):
        raise not_square(network, f"{output.shape[1] - cut.prefix} tokens", images_BKHW)
    if map_BDHW.shape[2] != map_BDHW.shape[3]:
        raise not_square(network, f"{map_BDHW.shape[2]} x {map_BDHW.shape[3]}", images_BKHW)
    return map_BDHW


def not_square(network: nn.Module, measured: str, images_BKHW: Tensor) -> UnsupportedError:
    """The refusal of a map, or of tokens, that make no square grid."""
    height, width = images_BKHW.shape[-2:]
    return UnsupportedError(
        f"cells need a square feature map; that of {describe(network)} is {measured} for "
        f"{height} x {width} px images.",
        hint="Feed square images, or ask for scales: [1].",
    )


def find_cut(
    network: nn.Module,
    images_BKHW: Tensor,
    *,
    agrees: Callable[[Cut], bool],
    module: str | None = None,
    fed: str | None = None,
) -> Cut:
    """The cut of a network in evaluation mode, measured on random images.

    Args:
        network: any network.
        images_BKHW: random images, to measure with.
        agrees: whether the network answers the same with the map's mean in place of the map.
        module: name of the module that makes the map, if not to be found.
        fed: name of the module that is fed the mean, if not to be found.

    Raises:
        ConfigError: there is no such module.
        UnsupportedError: no map has a mean that is classified.
    """
    for name in (module, fed):
        _require_module(network, name)
    calls, answer_BC = _record(network, images_BKHW)
    found = list(_matches(calls, answer_BC, images_BKHW.shape[-1], module, fed))
    # A classifier on pooled pixels answers maps of one pixel, too: larger maps come first.
    found.sort(key=lambda each: each.height * each.width == 1)
    for each in found[:MAX_TRIED]:
        if each.height != each.width:
            raise not_square(network, f"{each.height} x {each.width}", images_BKHW)
        if fed is None and agrees(each.cut._replace(fed=None)):
            return each.cut._replace(fed=None)
        if each.cut.fed is not None and agrees(each.cut):
            return each.cut
    if module is not None:
        if all(call.name != module for call in calls):
            raise UnsupportedError(
                f"{reader_of(network).who}: the module {module!r} does not run exactly once.",
                hint="Name the module that makes the map, after which the network only pools and "
                "classifies.",
            )
        for cut in _named_cuts(calls, module):
            if agrees(cut):
                return cut
    raise _no_map(network, found, module, fed)


def _require_module(network: nn.Module, name: str | None) -> None:
    known = dict(network.named_modules())
    if name is not None and name not in known:
        import difflib

        close = difflib.get_close_matches(name, [each for each in known if each], n=3, cutoff=0.4)
        listed = close or [each for each in known if each and "." not in each][:8]
        raise ConfigError(
            f"{reader_of(network).who} has no module {name!r}.",
            hint=f"Its modules are named as in named_modules(), such as {', '.join(listed)}.",
        )


def _record(network: nn.Module, images_BKHW: Tensor) -> tuple[list[_Call], Tensor]:
    """Run the network once; the calls of modules that ran once, and its answer."""
    calls: list[_Call] = []
    thread = threading.get_ident()
    begins: dict[str, list[tuple[int, Tensor | None]]] = {}  # of every run of a module

    def begin(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if threading.get_ident() != thread:
                return
            first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            vector = first is not None and (first.ndim == 2 or _is_pixel(first))
            # A copy, because an activation may work in place.
            fed = first.clone() if vector and first is not None else None
            begins.setdefault(name, []).append((len(calls), fed))

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            if threading.get_ident() != thread:
                return
            began, fed = begins[name][-1]
            answer = output if isinstance(output, Tensor) else images_BKHW.new_zeros(())
            pools = _is_pixel(answer) and _pools(module, inputs)
            means = dict(_means(answer, ("", "relu")))
            calls.append(_Call(name, fed, began, answer, answer._version, means, pools))  # noqa: SLF001 - counts changes in place

        return hook

    with ExitStack() as stack:
        for name, module in network.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                stack.callback(module.register_forward_pre_hook(begin(name)).remove)
                stack.callback(module.register_forward_hook(end(name)).remove)
        answer_BC = ask(network, images_BKHW)
    return [call for call in calls if len(begins[call.name]) == 1], answer_BC


def _is_pixel(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[2:] == (1, 1)


def _pools(module: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether a module without weights makes one pixel of a map, or would of a larger one."""
    if next(module.parameters(), None) is not None:
        return False
    return bool(inputs and not _is_pixel(inputs[0])) or "pool" in type(module).__name__.lower()


def _means(output: Tensor, finishes: tuple[str, ...]) -> Iterator[tuple[_Form, Tensor]]:
    """The means [B, D] of a module's output, for each way in which it can be a map."""
    if not output.is_floating_point() or output.ndim not in (3, 4):
        return
    prefixes = range(MAX_PREFIX + 1)
    cuts = (
        [Cut("", "", "NLC", prefix) for prefix in prefixes]
        if output.ndim == 3
        else [Cut("", "", "NCHW"), Cut("", "", "NHWC")]
    )
    for cut in cuts:
        for finish in finishes:
            map_BDHW = cut._replace(finish=finish).as_map(output)
            if map_BDHW is not None and map_BDHW.numel():
                yield (cut.layout, cut.prefix, finish), map_BDHW.mean((2, 3))


def _matches(
    calls: list[_Call], answer_BC: Tensor, size: int, module: str | None, fed: str | None
) -> Iterator[_Found]:
    """Maps whose mean is fed to a module or answered, the last one first."""
    vectors = [
        (call.began, call.name, call.fed.flatten(1)) for call in calls if call.fed is not None
    ]
    vectors.sort(key=lambda each: each[0])
    if fed is not None:
        vectors = [each for each in vectors if each[1] == fed]
    for index, call in reversed(list(enumerate(calls))):
        if module is not None and call.name != module:
            continue
        for (layout, prefix, finish), mean_BD in _all_means(call):
            sides = _sides(call.output, layout, prefix)
            if sides == (1, 1) and (size >= SMALLEST_POOLED or _is_pooled(calls, call)):
                continue
            fitting = [name for began, name, v in vectors if began > index and _equal(v, mean_BD)]
            if fitting or (fed is None and _equal(answer_BC, mean_BD)):
                named = fitting[0] if fitting else None
                yield _Found(Cut(call.name, finish, layout, prefix, named), *sides)
                break


def _all_means(call: _Call) -> Iterator[tuple[_Form, Tensor]]:
    yield from call.means.items()
    if call.output._version == call.version:  # noqa: SLF001 - else something changed it in place
        yield from _means(call.output, tuple(FINISHES)[2:])


def _sides(output: Tensor, layout: Layout, prefix: int) -> tuple[int, int]:
    if layout == "NLC":
        return (math.isqrt(output.shape[1] - prefix),) * 2
    height, width = output.shape[1:3] if layout == "NHWC" else output.shape[2:]
    return height, width


def _is_pooled(calls: list[_Call], one: _Call) -> bool:
    """Whether one of the modules that answer this very tensor has pooled it."""
    return any(call.pools and call.output is one.output for call in calls)


def _equal(vector_BD: Tensor, mean_BD: Tensor) -> bool:
    if vector_BD.shape != mean_BD.shape:
        return False
    largest = float(mean_BD.abs().max())
    relative = max(torch.finfo(mean_BD.dtype).eps, torch.finfo(vector_BD.dtype).eps) ** 0.5
    off = float((vector_BD.to(mean_BD.dtype) - mean_BD).abs().max())
    # Zeros are the mean of every dead map.
    return largest > 0 and off <= relative * largest


def _named_cuts(calls: list[_Call], module: str) -> Iterator[Cut]:
    """Every way in which the output of a named module can be the map."""
    for call in calls:
        if call.name == module:
            for layout, prefix, finish in (key for key, _ in _all_means(call)):
                yield Cut(module, finish, layout, prefix)


def _no_map(
    network: nn.Module, found: list[_Found], module: str | None, fed: str | None
) -> UnsupportedError:
    section = reader_of(network).section
    hint = SCALE_ONE_HINT
    if section and module is None:
        hint += f" If it does, name the module that makes the map: {section}.feature_map."
    if found:
        reason = (
            f"with the mean of the output of {found[0].cut.module} in place of that output it "
            "answers otherwise"
        )
    elif module is not None or fed is not None:
        named = " and ".join(
            f"{key} {name}" for key, name in (("feature_map", module), ("classifier", fed)) if name
        )
        reason = f"with the mean of the map ({named}) in place of the map it answers otherwise"
    else:
        reason = (
            "its feature map cannot be found, because none of its modules answers a map whose mean "
            "another module is fed"
        )
    return UnsupportedError(f"{describe(network)} has no cells: {reason}.", hint=hint)
