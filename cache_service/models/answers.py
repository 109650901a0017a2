"""What a network returns, read as logits [N, C].

Networks return a tensor, an object with `.logits` (Hugging Face), a tuple with auxiliary heads or a
mapping. An `AnswerReader` finds the logits or refuses, and names the parts that there are. As a
forward hook it does so at every call of a network, so that all callers get logits.

Shape letters: N rows, B images of K channels, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cache_service.errors import UnsupportedError

Answers = Literal["logits", "probabilities"]

MEAN = "mean"
"""The `output` that averages all logits of a tuple, as DeiT does with its two heads."""

LOG_FLOOR = 2.0**-126
"""Smallest probability whose logarithm is taken, the smallest normal number of float32: a smaller
one, such as 0, counts as this one, and its logit is -87.3. Part of the format."""

SUM_TOLERANCE = 1e-4
"""Largest distance from 1 of the sum of probabilities in float32."""

MAX_LISTED = 6
"""Parts of an answer that a message lists."""


class AnswerReader(NamedTuple):
    """Turns what a network returns into logits. Registered as a forward hook by `read_answers`.

    Attributes:
        who: the network, for messages.
        section: section of the config file whose keys help, teacher or student; empty if none.
        output: index, key or attribute of the logits, with dots where they nest, or `mean`.
        answers: `probabilities` takes the logarithm.
    """

    who: str
    section: str
    output: str | int | None = None
    answers: Answers = "logits"

    def __call__(self, _network: Any, _inputs: tuple[Any, ...], answer: Any, /) -> Any:
        """The hook."""
        return self.read(answer)

    def read(self, answer: object) -> Tensor:
        """Logits [N, C] of what the network returned.

        Raises:
            UnsupportedError: there are none, or more than one tensor could be meant.
        """
        logits_NC = self.pick(answer)
        if self.answers == "probabilities":
            return logits_NC.float().clamp_min(LOG_FLOOR).log()
        return logits_NC

    def pick(self, answer: object) -> Tensor:
        """The part of the answer that `output` means, [N, C], before any logarithm."""
        if isinstance(answer, Tensor):
            found: object = answer  # a network may return a tuple in training mode only
        elif self.output == MEAN:
            found = _mean(answer)
        elif self.output is not None:
            found = _part(answer, str(self.output))
        else:
            parts = _parts(answer)
            found = parts[0][1] if len(parts) == 1 else _part(answer, "logits")
        rows = _as_rows(found)
        if rows is None:
            raise self._refusal(answer, found)
        return rows

    def _refusal(self, answer: object, found: object) -> UnsupportedError:
        needed = f"where logits of shape ({_batch_of(answer)}, classes) are needed"
        if isinstance(answer, Tensor):
            return UnsupportedError(
                f"{self.who} answers {_describe(answer)} {needed}.",
                hint="Wrap it in a module that returns its logits, one row a sample.",
            )
        parts = _parts(answer)
        listed = ", ".join(f"{name}: {_describe(part)}" for name, part in parts[:MAX_LISTED])
        more = f" and {len(parts) - MAX_LISTED} more" if len(parts) > MAX_LISTED else ""
        holds = f" of {listed}{more}" if parts else ""
        meant = "" if self.output is None else f", and output {self.output!r} means "
        meant += "" if self.output is None else "nothing" if found is None else _describe(found)
        fitting = [name for name, part in parts if _as_rows(part) is not None]
        hint = "Wrap it in a module that returns its logits, one row a sample."
        if fitting and self.section:
            hint = (
                f"Set {self.section}.output to the part with the logits, for example {fitting[0]}."
            )
        return UnsupportedError(
            f"{self.who} answers a {type(answer).__name__}{holds}{meant}, {needed}.", hint=hint
        )


def read_answers(network: nn.Module, reader: AnswerReader) -> None:
    """Make every call of the network return logits. Its weights and their names do not change."""
    for key, hook in list(network._forward_hooks.items()):  # noqa: SLF001 - torch lists hooks nowhere else
        if isinstance(hook, AnswerReader):
            del network._forward_hooks[key]  # noqa: SLF001 - the reader of earlier settings
    read: Any = reader  # mypy does not take the class for torch's type of hooks
    network.register_forward_hook(read)


def reader_of(network: nn.Module) -> AnswerReader:
    """The reader that the network was given, or one for networks that were given none."""
    return _given_reader(network) or AnswerReader(describe(network), section="")


def ask(network: nn.Module, images_BKHW: Tensor) -> Tensor:
    """Logits [B, C] of a network that was given a reader or not."""
    answer = network(images_BKHW)
    return reader_of(network).read(answer) if _given_reader(network) is None else answer


def ask_unread(network: nn.Module, images_BKHW: Tensor) -> object:
    """What a network itself returns, before its reader.

    Raises:
        UnsupportedError: the reader finds no logits in it.
    """
    returned: list[object] = []

    def keep(_network: nn.Module, _inputs: object, answer: object) -> None:
        returned.append(answer)

    handle = network.register_forward_hook(keep, prepend=True)
    try:
        network(images_BKHW)
    finally:
        handle.remove()
    return returned[0]


def _given_reader(network: nn.Module) -> AnswerReader | None:
    hooks = network._forward_hooks.values()  # noqa: SLF001 - torch lists hooks nowhere else
    return next((hook for hook in hooks if isinstance(hook, AnswerReader)), None)


def describe(network: nn.Module) -> str:
    """The network's name for messages: timm's where it has one, else its class."""
    cfg = getattr(network, "pretrained_cfg", None)
    named = cfg.get("architecture") if isinstance(cfg, dict) else None
    return str(named or type(network).__name__)


def look_like_probabilities(answer_NC: Tensor) -> bool:
    """Whether no number is negative and every row sums to 1, up to rounding."""
    tolerance = max(SUM_TOLERANCE, 4 * torch.finfo(answer_NC.dtype).eps)
    sums_N = answer_NC.double().sum(dim=1)
    return bool((answer_NC >= 0).all() and ((sums_N - 1).abs() <= tolerance).all())


def _as_rows(part: object) -> Tensor | None:
    """A floating-point tensor [N, C], C >= 2, of [N, C] or of maps of one pixel [N, C, 1, 1]."""
    if not isinstance(part, Tensor) or part.ndim < 2 or not part.is_floating_point():
        return None
    if part.shape[1] < 2 or any(side != 1 for side in part.shape[2:]):
        return None
    return part.flatten(1)


def _part(answer: object, path: str) -> object:
    """The part by a path such as `logits`, `0` or `head.1`; None if there is none."""
    here: Any = answer
    if isinstance(here, Mapping) and path in here:
        return here[path]
    for step in path.split("."):
        if isinstance(here, Mapping):
            here = here.get(step, here.get(int(step)) if step.isdecimal() else None)
        elif isinstance(here, list | tuple) and step.removeprefix("-").isdecimal():
            here = here[int(step)] if -len(here) <= int(step) < len(here) else None
        elif isinstance(here, Tensor):
            return None
        else:
            here = getattr(here, step, None)
    return here


def _parts(answer: object) -> list[tuple[str, object]]:
    if isinstance(answer, Mapping):
        return [(str(key), value) for key, value in answer.items() if value is not None]
    if isinstance(answer, list | tuple):
        names = getattr(answer, "_fields", range(len(answer)))
        return [(str(name), value) for name, value in zip(names, answer, strict=True)]
    return [
        (key, value) for key, value in getattr(answer, "__dict__", {}).items() if key[:1] != "_"
    ]


def _mean(answer: object) -> object:
    heads = [rows for rows in (_as_rows(part) for _, part in _parts(answer)) if rows is not None]
    if not heads or len({head.shape for head in heads}) > 1:
        return None
    return torch.stack(heads).mean(dim=0)


def _batch_of(answer: object) -> str:
    tensors = [answer] if isinstance(answer, Tensor) else [part for _, part in _parts(answer)]
    batches = {len(each) for each in tensors if isinstance(each, Tensor) and each.ndim}
    return str(batches.pop()) if len(batches) == 1 else "batch"


def _describe(part: object) -> str:
    if not isinstance(part, Tensor):
        return f"a {type(part).__name__}"
    kind = "" if part.is_floating_point() else f" of {str(part.dtype).removeprefix('torch.')}"
    return f"{tuple(part.shape)}{kind}"
