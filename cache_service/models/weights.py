"""Weights of a network: found in the content of a checkpoint, chosen, and held against the network.

Training scripts save an average of the weights (EMA, SWA) beside the raw ones. Both fit the
network, and the averaged ones usually classify better, so neither is loaded by accident.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cache_service.errors import ConfigError
from cache_service.human_format import one_line
from cache_service.models.checkpoint_file import read_checkpoint

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


BATCH_COUNTER = ".num_batches_tracked"
"""Batch norms of torch < 0.4.1 did not count their batches; torch fills that in."""


def load_checkpoint(
    model: nn.Module, path: str | Path, *, weights: WeightsChoice | None = None
) -> str:
    """Load weights from a file into the network, all of them or none.

    Args:
        model: changed in place; its dtype and device stay.
        path: .safetensors, or anything `torch.load` reads with weights_only. A state dict below
            `state_dict` or `model` is found. A prefix of the keys (`module.`, `model.student.`) is
            taken off if all keys below it, and their shapes, then fit the network exactly.
        weights: which to load from a file that holds the network's raw weights and averaged ones
            (EMA, SWA) beside them. Without it such a file is refused.

    Returns:
        What was loaded, for people: "averaged weights, state_dict_ema of best.pth", or "raw
        weights, state_dict (keys below 'model.') of last.ckpt".

    Raises:
        ConfigError: the file is missing, unreadable or of another network, or does not hold the
            weights asked for, or holds both kinds and `weights` was not given, or holds several
            networks that fit below different prefixes.
    """
    file = Path(path)
    chosen = choose_weights(file, find_weights(file, read_checkpoint(file), model), weights)
    _require_fit(file, model, chosen.tensors)
    try:
        model.load_state_dict(chosen.tensors)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"checkpoint {file} cannot be loaded into {type(model).__name__}: {one_line(error)}"
        ) from error
    kind = "averaged" if chosen.averaged else "raw"
    below = f" (keys below {chosen.prefix!r})" if chosen.prefix else ""
    if not chosen.key:
        return f"{file.name}{below}"
    return f"{kind} weights, {chosen.key}{below} of {file.name}"


class Weights(NamedTuple):
    """One state dict of a checkpoint file. `key` is where it was found; empty at the top.

    `prefix` was taken off the names of the tensors, beyond what wrappers put there.
    """

    key: str
    tensors: dict[str, Tensor]
    averaged: bool
    prefix: str = ""


def find_weights(file: Path, content: object, model: nn.Module) -> list[Weights]:
    """The state dicts of a checkpoint's content: the raw one, then averages of it.

    Raises:
        ConfigError: there is none, or several networks in one state dict fit the model.
    """
    if isinstance(content, Mapping):
        names = [key for key in content if isinstance(key, str)]
        averaged = [key for key in names if AVERAGED.search(key.lower())]
        raw = [key for key in NESTED_UNDER + RAW_ELSEWHERE * bool(averaged) if key in content]
        found = [
            Weights(key, tensors, key in averaged)
            for key in raw + averaged
            if (tensors := _state_dict(content[key])) is not None
        ]
        # An average of something else, such as the losses, shares no name with the weights, neither
        # as saved (an average without buffers fits below no prefix) nor without a prefix.
        fitted = [_without_prefix(file, each, model) for each in found]
        found = [
            each
            for before, each in zip(found, fitted, strict=True)
            if not before.tensors.keys().isdisjoint(found[0].tensors)
            or not each.tensors.keys().isdisjoint(fitted[0].tensors)
        ]
        if found:
            return [w for w in found if not w.averaged][:1] + [w for w in found if w.averaged]
    return [_without_prefix(file, _plain_weights(file, content), model)]


def choose_weights(file: Path, found: list[Weights], choice: WeightsChoice | None) -> Weights:
    """The raw or the averaged weights of a checkpoint.

    Raises:
        ConfigError: they are not in the file, or both are and there is no choice.
    """
    raw = next((each for each in found if not each.averaged), None)
    averages = [each for each in found if each.averaged]
    if len(averages) > 1 and choice != "raw":
        names = ", ".join(repr(each.key) for each in averages)
        raise ConfigError(
            f"checkpoint {file} holds several averages of the weights: {names}.",
            hint="Save one of them as a file of its own, or set `checkpoint_weights: raw`.",
        )
    averaged = averages[0] if averages else None
    if choice is None:
        if raw is None or averaged is None or _equal(raw.tensors, averaged.tensors):
            return found[0]
        raise ConfigError(
            f"checkpoint {file} holds raw weights under {raw.key!r} and averaged ones (EMA) under "
            f"{averaged.key!r}, and they differ.",
            hint="Beside `checkpoint`, set `checkpoint_weights: averaged` (usually the better "
            "ones, and those that training scripts evaluate) or `checkpoint_weights: raw`.",
        )
    chosen = averaged if choice == "averaged" else raw
    if chosen is None:
        other, key = ("raw" if choice == "averaged" else "averaged"), found[0].key
        raise ConfigError(
            f"checkpoint {file} holds no {choice} weights, only {other} ones"
            f"{f' under {key!r}' if key else ''}.",
            hint="Leave `checkpoint_weights` out to load those.",
        )
    return chosen


def _state_dict(value: object, depth: int = 3) -> dict[str, Tensor] | None:
    """The tensors of a state dict, which may be nested a few times; None for anything else."""
    if not isinstance(value, Mapping) or not value:
        return None
    if all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
        return _without_wrappers(dict(value))
    inner = next((value[key] for key in HOLDERS if isinstance(value.get(key), Mapping)), None)
    return _state_dict(inner, depth - 1) if depth else None


def _plain_weights(file: Path, content: object) -> Weights:
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


def _without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if COUNTER in weights and all(key.startswith(("module.", COUNTER)) for key in weights):
        weights = {key: value for key, value in weights.items() if key != COUNTER}
    for wrapper in (*WRAPPERS, *WRAPPERS):  # they nest, in either order
        if all(key.startswith(wrapper) for key in weights):
            weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    return weights


def _without_prefix(file: Path, weights: Weights, model: nn.Module) -> Weights:
    """The tensors below the one prefix with which they fit the network; unchanged if none does."""
    tensors, expected = weights.tensors, model.state_dict()
    if not expected or not _misfits(expected, tensors):
        return weights
    needed = [key for key in expected if not key.endswith(BATCH_COUNTER)] or list(expected)
    ends = [key.removesuffix(needed[0]) for key in tensors if key.endswith(needed[0])]
    fitting: dict[str, dict[str, Tensor]] = {}
    for prefix in ends:
        if (prefix and not prefix.endswith(".")) or any(prefix + k not in tensors for k in needed):
            continue
        below = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if not prefix:  # a whole network beside others that have a prefix
            below = {key: value for key, value in below.items() if key in expected}
        if not _misfits(expected, below):
            fitting[prefix] = below
    if not any(fitting):
        return weights
    prefix, below = next((prefix, below) for prefix, below in fitting.items() if prefix)
    if not all(_equal(below, other) for other in fitting.values()):
        raise ConfigError(
            f"checkpoint {file} holds several networks that fit {type(model).__name__} and "
            f"differ, below the prefixes {', '.join(map(repr, fitting))} of its keys.",
            hint="Save the one you need as a file of its own, with keys that lack the prefix.",
        )
    averaged = weights.averaged or AVERAGED.search(prefix.lower()) is not None
    return weights._replace(tensors=below, averaged=averaged, prefix=prefix)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _require_fit(file: Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    problems = _misfits(model.state_dict(), weights)
    if problems:
        raise ConfigError(
            f"checkpoint {file} does not fit {type(model).__name__}: it {', '.join(problems)}.",
            hint="Check the model's name, num_classes and model_args.",
        )


def _misfits(expected: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
    """How weights differ from a network's state dict in names and shapes."""
    missing = [key for key in expected if key not in weights and not key.endswith(BATCH_COUNTER)]
    unknown = [key for key in weights if key not in expected]
    other = [
        f"{key} is {list(weights[key].shape)} in the file and {list(value.shape)} in the network"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    return [
        *_first("lacks", missing),
        *_first("has the unknown", unknown),
        *_first("differs in shape:", other),
    ]


def _first(problem: str, cases: list[str]) -> list[str]:
    if not cases:
        return []
    more = f" (and {len(cases) - 1} more)" if len(cases) > 1 else ""
    return [f"{problem} {cases[0]}{more}"]
