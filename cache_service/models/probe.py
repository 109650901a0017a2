"""Asks a network for random images once, before it costs anything, and says what does not fit.

Where a network refuses images, others are tried: another number of channels, another size, another
memory format. The error names the setting with which it answers.

Shape letters: B batch, N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cache_service.errors import ConfigError, KdCacheError, UnsupportedError
from cache_service.human_format import one_line
from cache_service.models.answers import ask, reader_of
from cache_service.plugins import raised_in

NUM_IMAGES = 2
"""Batch norm cannot compute a variance from one image."""

CHANNELS = (3, 1, 2, 4, 6)
"""Numbers of channels that are tried where a network takes none of those it is fed."""

SIZES = (224, 32, 64, 28, 96, 128, 256, 299, 384, 160, 192, 240, 260, 300, 336, 448, 512)
"""Sides that are tried where a network does not take the size it is fed, px."""


class Fed(NamedTuple):
    """What a network is fed, to be measured or measured.

    Attributes:
        size: side of its input, px.
        channels: 3, or 1 for grey images.
        channels_last: memory format of its input.
    """

    size: int
    channels: int = 3
    channels_last: bool = False

    def images(self, anchor: Tensor) -> Tensor:
        """Random float32 images [B, channels, size, size], as views are, the same in every run."""
        shape = (NUM_IMAGES, self.channels, self.size, self.size)
        images = random_like(anchor.float(), *shape)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout)


def probe(network: nn.Module, fed: Fed) -> Tensor:
    """The network's logits [B, C] of random images, in evaluation mode. It is left as it was.

    Raises:
        ConfigError: it does not take such images. The hint names a setting with which it does.
        UnsupportedError: what it answers is not logits, or not finite.
    """
    reader = reader_of(network)
    problem = _try(network, fed)
    if not isinstance(problem, Exception):
        return _require_logits(network, problem)
    if isinstance(problem, KdCacheError):
        raise problem
    raise ConfigError(
        f"{reader.who} cannot be fed {_named(fed)}: {where_it_failed(problem)}",
        hint=_hint(network, fed, reader.section),
    ) from problem


def answers_when_fed(network: nn.Module, fed: Fed) -> bool:
    """Whether the network takes such images at all."""
    return not isinstance(_try(network, fed), Exception)


def where_it_failed(error: BaseException) -> str:
    """An exception of a user's network in one line, with the line of code that raised it."""
    text = one_line(error)
    if not isinstance(error, RuntimeError | AssertionError):
        text = f"{type(error).__name__}: {text}"
    return f"{text.rstrip('.')}{raised_in(error)}."


def _try(network: nn.Module, fed: Fed) -> Tensor | Exception:
    try:
        with probing(network):
            return ask(network, fed.images(anchor_of(network)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a user's network may raise anything
        return error


def _require_logits(network: nn.Module, answer_BC: Tensor) -> Tensor:
    reader = reader_of(network)
    if len(answer_BC) != NUM_IMAGES:
        raise UnsupportedError(
            f"{reader.who} answers {len(answer_BC)} rows for {NUM_IMAGES} images, where one row an "
            "image is needed.",
            hint="Wrap it in a module that returns its logits, one row a sample.",
        )
    if not bool(answer_BC.isfinite().all()):
        raise UnsupportedError(
            f"{reader.who} answers random images with numbers that are not finite.",
            hint="Check its weights, and the number type that it computes in.",
        )
    return answer_BC


def _hint(network: nn.Module, fed: Fed, section: str) -> str:
    """What to set so that the network takes its input; the first change of `fed` that helps."""
    if fed.channels_last and answers_when_fed(network, fed._replace(channels_last=False)):
        return layout_hint(section)
    for channels in _others(CHANNELS, fed.channels):
        if answers_when_fed(network, fed._replace(channels=channels)):
            return _channels_hint(channels, section)
    described = getattr(network, "pretrained_cfg", None) or {}
    sides = described.get("input_size", ()) if isinstance(described, dict) else ()
    for size in _others((*sides[-1:], *SIZES), fed.size):
        if answers_when_fed(network, fed._replace(size=size)):
            return f"Set {section}.input_size to the size that it was made for, for example {size}."
    dtype = anchor_of(network).dtype
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        return f"Its weights are {name}, and views are float32: return it with `.float()`."
    return f"Check {section}.model, {section}.model_args and {section}.input_size."


def layout_hint(section: str) -> str:
    """The setting for networks that cannot run in the channels-last memory format."""
    # For a student it is a key of the train file itself.
    return f"Set {'teacher.' if section == 'teacher' else ''}channels_last: false."


def _channels_hint(channels: int, section: str) -> str:
    if channels == 1:
        return f"It takes 1 channel: set {section}.channels: 1, and views are converted to grey."
    if channels == 3:
        return f"It takes 3 channels: set {section}.channels: 3."
    return (
        f"It takes {channels} channels, and views have 3, or 1 with {section}.channels: 1. Wrap it "
        "in a module that makes its input of these."
    )


def _others(values: Sequence[int], taken: int) -> list[int]:
    return [value for value in dict.fromkeys(values) if value != taken]


def _named(fed: Fed) -> str:
    kind = "" if fed.channels == 3 else f" of {fed.channels} channel"
    layout = " in channels-last format" if fed.channels_last else ""
    return f"{fed.size} x {fed.size} px images{kind}{layout}"


def anchor_of(network: nn.Module) -> Tensor:
    """A tensor of the network's device and dtype."""
    return next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))


def random_like(anchor: Tensor, *shape: int) -> Tensor:
    """Normal numbers, the same in every run, of the anchor's device and dtype."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(anchor.device, anchor.dtype)


@contextmanager
def probing(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, full precision, no gradients; every module's mode is put back after."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad(), torch.autocast(anchor_of(network).device.type, enabled=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
