"""The state dicts in a checkpoint file, and which of them is meant: raw or averaged weights.

Training scripts save an average of the weights (EMA, SWA) beside the raw ones. Both fit the
network, and the averaged ones usually classify better, so neither is taken by accident.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cache_service.errors import ConfigError

WeightsChoice = Literal["raw", "averaged"]

NESTED_UNDER = ("state_dict", "model", "model_state_dict")
"""Keys under which training scripts put the weights, beside their optimizer and epoch."""

RAW_ELSEWHERE = ("net", "network", "model_state", "params", "weights", "module")
"""Keys of raw weights that are looked at only to tell them from averaged ones."""

AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|polyak|avg|averaged?)([^a-z]|$)|^ema|ema$")
"""Names of averaged weights, in lower case: state_dict_ema, model_ema, ema, swa_state_dict, ..."""

HOLDERS = (*NESTED_UNDER, "module", "shadow", "params")
"""Keys under which an averager's own state holds the weights."""

COUNTER = "n_averaged"
"""What torch.optim.swa_utils.AveragedModel puts beside the weights."""

WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel, AveragedModel and torch.compile put in front of every key."""


class Weights(NamedTuple):
    """One state dict of a checkpoint file. `key` is where it was found; empty at the top."""

    key: str
    tensors: dict[str, Tensor]
    averaged: bool


def find_weights(file: Path, content: object) -> list[Weights]:
    """Every state dict of a checkpoint's content, the raw one first.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(content, Mapping) and content:
        found = [
            Weights(key, tensors, averaged)
            for key, averaged in _named_places(content)
            if (tensors := _state_dict(content[key])) is not None
        ]
        raw = [each for each in found if not each.averaged]
        averaged = [each for each in found if each.averaged and _is_beside(each, raw)]
        if raw or averaged:
            return raw[:1] + averaged
    return [_whole(file, content)]


def choose_weights(file: Path, found: list[Weights], choice: WeightsChoice | None) -> Weights:
    """The weights that are meant.

    Raises:
        ConfigError: they are not in the file, or there are two kinds and no choice.
    """
    raw = next((each for each in found if not each.averaged), None)
    averages = [each for each in found if each.averaged]
    averaged = averages[0] if averages else None
    if len(averages) > 1 and choice != "raw":
        names = ", ".join(repr(each.key) for each in averages)
        raise ConfigError(
            f"checkpoint {file} holds several averages of the weights: {names}.",
            hint="Save the one that is meant as a file of its own, or set "
            "`checkpoint_weights: raw`.",
        )
    if choice is None:
        if raw is None or averaged is None or _equal(raw.tensors, averaged.tensors):
            return found[0]
        raise ConfigError(
            f"checkpoint {file} holds raw weights under {raw.key!r} and averaged ones (EMA) under "
            f"{averaged.key!r}, and they differ.",
            hint="Beside `checkpoint`, set `checkpoint_weights: averaged` (usually the better "
            "ones, and those that training scripts evaluate) or `checkpoint_weights: raw`.",
        )
    wanted = averaged if choice == "averaged" else raw
    if wanted is None:
        only = found[0]
        kind = "averaged" if only.averaged else "raw"
        raise ConfigError(
            f"checkpoint {file} holds no {choice} weights, only {kind} ones"
            f"{f' under {only.key!r}' if only.key else ''}.",
            hint="Leave `checkpoint_weights` out to load those.",
        )
    return wanted


def _named_places(content: Mapping[Any, Any]) -> list[tuple[str, bool]]:
    """Keys that may hold weights, and whether those are averaged."""
    names = [key for key in content if isinstance(key, str)]
    averaged = [(key, True) for key in names if AVERAGED.search(key.lower())]
    raw = [key for key in NESTED_UNDER if key in content]
    if averaged:
        raw += [key for key in RAW_ELSEWHERE if key in content]
    return [*((key, False) for key in raw), *averaged]


def _state_dict(value: object) -> dict[str, Tensor] | None:
    """The tensors of a state dict, which may be nested once more; None for anything else."""
    for _ in range(4):
        if not isinstance(value, Mapping):
            return None
        if value and all(isinstance(each, Tensor) for each in value.values()):
            break
        inner = next((k for k in HOLDERS if isinstance(value.get(k), Mapping)), None)
        if inner is None:
            return None
        value = value[inner]
    else:
        return None
    if not all(isinstance(key, str) for key in value):
        return None
    return _without_wrappers(dict(value))


def _whole(file: Path, content: object) -> Weights:
    """The content itself as one state dict."""
    for key in NESTED_UNDER:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(
            f"checkpoint {file} holds a {type(content).__name__} where a state dict is needed.",
            hint="Save model.state_dict().",
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ConfigError(
                f"checkpoint {file} holds no state dict: {key!r} is a {type(value).__name__}.",
                hint=f"Save model.state_dict(), alone or under one of {', '.join(NESTED_UNDER)}.",
            )
    return Weights("", _without_wrappers(dict(content)), averaged=COUNTER in content)


def _is_beside(averaged: Weights, raw: list[Weights]) -> bool:
    """Whether these are weights of the same network, and not an average of something else."""
    return not raw or not averaged.tensors.keys().isdisjoint(raw[0].tensors)


def _without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    rest = {key: value for key, value in weights.items() if key != COUNTER}
    if rest and all(key.startswith("module.") for key in rest):
        weights = rest
    for wrapper in (*WRAPPERS, *WRAPPERS):  # they nest, in either order
        if all(key.startswith(wrapper) for key in weights):
            weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    return weights


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
