"""Weights of a network: found in the content of a checkpoint, held against the network, chosen.

Training scripts put weights under many names, below prefixes, and beside other networks and
averages of them. What fits the network decides which of them are meant: every state dict of a
checkpoint is a candidate, whole or below a prefix, if its names and shapes are the network's.

Candidates that differ are never chosen between by guess. Averages (EMA, SWA) and raw weights are
told apart by their names: both fit the network, and the averaged ones usually classify better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cache_service.errors import ConfigError
from cache_service.human_format import describe_error
from cache_service.models.checkpoint_file import checkpoint_path, read_checkpoint
from cache_service.models.lookalikes import find_lookalikes, other_outputs
from cache_service.models.state_dicts import (
    COUNTERS,
    WRAPPERS,
    StateDict,
    find_state_dicts,
    names_average,
)

WeightsChoice = Literal["raw", "averaged"]

AVERAGER_STATE = (*COUNTERS, "num_updates", "decay", "initted", "step")
"""Numbers of averagers that are no weights."""

BATCH_COUNTER = ".num_batches_tracked"
"""Batch norms of torch < 0.4.1 did not count their batches; torch fills that in."""

TOP = "."
"""The name of weights that lie at the top of a file, below no prefix."""


class Weights(NamedTuple):
    """A candidate: the tensors of a state dict below a prefix, which was taken off."""

    place: str
    prefix: str
    """Ends with a dot, or is empty."""
    tensors: dict[str, Tensor]
    averaged: bool

    @property
    def name(self) -> str:
        """What `checkpoint_key` calls these weights."""
        return ".".join(filter(None, (self.place, self.prefix.rstrip(".")))) or TOP

    def describe(self, file: Path) -> str:
        """Which weights of which file these are, for people."""
        kind = "averaged weights" if self.averaged else "raw weights"
        if self.prefix:
            below = f"keys below {self.prefix!r}"
            where = f"{self.place} ({below})" if self.place else below
        else:
            where = self.place
        if where:
            return f"{kind}, {where} of {file.name}"
        return f"{kind} of {file.name}" if self.averaged else file.name


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    weights: WeightsChoice | None = None,
    key: str | None = None,
    model_name: str = "",
) -> str:
    """Load weights from a file into the network, all of them or none.

    Args:
        model: changed in place; its dtype and device stay.
        path: .safetensors, anything `torch.load` reads with weights_only, or a folder that holds
            such a file. Any state dict in it counts, under whatever keys, whose names and shapes
            are those of the network exactly, below a prefix or not (`module.`, `model.student.`).
        weights: which to load from a file that holds the network's raw weights and averaged ones
            (EMA, SWA) beside them. Without it such a file is refused.
        key: which to load from a file with several networks that fit: `student`, or
            `state_dict.teacher`. A part of the name is enough if it names one.
        model_name: the network's name in the config file, for a hint to another network of this
            name that the weights fit.

    Returns:
        What was loaded, for people: "averaged weights, state_dict_ema of best.pth", or "raw
        weights, state_dict (keys below 'model.') of last.ckpt".

    Raises:
        ConfigError: the file is missing, unreadable or of another network, or does not hold the
            weights asked for, or holds several that fit and differ.
    """
    file = checkpoint_path(path)
    content = read_checkpoint(file)
    expected = model.state_dict()
    found = list(find_state_dicts(content, expected))
    if not found:
        raise _no_tensors(file, content)
    candidates = find_weights(found, model)
    if key is not None:
        candidates, found = _named(file, candidates, found, model, key)
    if not candidates:
        raise _misfit(file, model, _nearest(found, expected), model_name)
    chosen = choose_weights(file, candidates, weights)
    if _misfits(expected, chosen.tensors):  # an average of the parameters only, chosen by name
        raise _misfit(file, model, chosen, model_name)
    dense = {
        key: value if value.layout is torch.strided else value.to_dense()
        for key, value in chosen.tensors.items()
    }
    try:
        model.load_state_dict(dense)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"checkpoint {file} cannot be loaded into {type(model).__name__}: "
            f"{describe_error(error)}."
        ) from error
    return chosen.describe(file)


def find_weights(found: Sequence[StateDict], model: nn.Module) -> list[Weights]:
    """The candidates: what fits the network, and averages of its parameters that fit in part.

    An average that does not fit, because it lacks the buffers or has names of its own, is a
    candidate beside others: it shows that those are not the only weights of the file.
    """
    expected = model.state_dict()
    fitting = [each for state in found for each in _fitting(state, expected)]
    if not fitting:  # its parts may have been saved one by one: {"backbone": ..., "fc": ...}
        fitting = list(_fitting(_joined(found), expected))
    if not fitting:
        return []
    shapes = Counter(tuple(p.shape) for p in model.parameters())
    names = [name for name, _ in model.named_parameters()]
    in_part = [
        each
        for state in found
        for each in _averages_in_part(state, shapes, names)
        if not any(each.name == other.name or _within(other, each) for other in fitting)
    ]
    return fitting + in_part


def _joined(found: Sequence[StateDict]) -> StateDict:
    """All tensors of a checkpoint as one state dict, with the keys that lead to them."""
    tensors = {
        f"{state.place}.{key}" if state.place else key: value
        for state in found
        for key, value in state.tensors.items()
    }
    return StateDict("", tensors, any(state.averaged for state in found))


def _fitting(state: StateDict, expected: Mapping[str, Any]) -> Iterator[Weights]:
    """What of a state dict fits: the whole, or all keys below a prefix."""
    needed = _needed(expected)
    if not needed:
        return
    tensors = state.tensors
    ends = [key.removesuffix(needed[0]) for key in tensors if key.endswith(needed[0])]
    prefixes = [p for p in ends if not p or p.endswith(".")]
    fitting = []
    for prefix in prefixes:
        if all(prefix + key in tensors for key in needed):
            below = _below(tensors, prefix, expected)
            if prefix and not _misfits(expected, below):
                fitting.append(Weights(state.place, prefix, below, _is_average(state, prefix)))
    if "" in prefixes:
        whole = _below(tensors, "", expected)
        if fitting:  # a whole network beside others that have a prefix
            whole = {key: value for key, value in whole.items() if key in expected}
        if not _misfits(expected, whole):
            fitting.insert(0, Weights(state.place, "", whole, state.averaged))
    yield from fitting


def _is_average(state: StateDict, prefix: str) -> bool:
    return state.averaged or any(names_average(part) for part in prefix.split("."))


def _below(
    tensors: Mapping[str, Tensor], prefix: str, expected: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors below a prefix, which is taken off, without the numbers of averagers."""
    below = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    for name in AVERAGER_STATE:
        if name in below and name not in expected and below[name].ndim == 0:
            del below[name]
    return below


def _averages_in_part(
    state: StateDict, shapes: Counter[tuple[int, ...]], names: Sequence[str]
) -> Iterator[Weights]:
    """Averages by their names that hold tensors of the shapes of all parameters."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.tensors.items():
        parts = key.split(".")[:-1]
        stop = next((i for i, part in enumerate(parts) if names_average(part)), None)
        if state.averaged or stop is not None:
            prefix = "" if stop is None else ".".join(parts[: stop + 1]) + "."
            groups.setdefault(prefix, {})[key.removeprefix(prefix)] = value
    for prefix, tensors in groups.items():
        if Counter(tuple(value.shape) for value in tensors.values()) >= shapes:
            in_order = all(key.isdigit() for key in tensors) and len(tensors) == len(names)
            named = dict(zip(names, tensors.values(), strict=True)) if in_order else tensors
            yield Weights(state.place, prefix, named, averaged=True)


def _within(inner: Weights, outer: Weights) -> bool:
    return inner.place == outer.place and inner.prefix.startswith(outer.prefix)


def _named(
    file: Path,
    candidates: Sequence[Weights],
    found: Sequence[StateDict],
    model: nn.Module,
    key: str,
) -> tuple[list[Weights], list[StateDict]]:
    """The candidates that `checkpoint_key` names, and the state dicts that it names.

    Raises:
        ConfigError: there is none of this name.
    """
    asked = ".".join(p for p in key.split(".") if p and p not in WRAPPERS) or key.strip(".") or TOP
    exact = [each for each in candidates if asked == each.name]
    part = [each for each in candidates if f".{asked}." in f".{each.name}."]
    there = [state for state in found if f".{asked}." in f".{state.place}."]
    if exact or part or there:
        return exact or part, there
    names = ", ".join(dict.fromkeys(repr(each.name) for each in candidates))
    raise ConfigError(
        f"checkpoint {file} holds no weights of {type(model).__name__} under "
        f"checkpoint_key: {key!r}.",
        hint=f"Those that fit are {names}." if names else "None of its weights fit.",
    )


def choose_weights(
    file: Path, candidates: Sequence[Weights], choice: WeightsChoice | None
) -> Weights:
    """The one candidate that is meant.

    Raises:
        ConfigError: there is none of the kind asked for, or several that differ.
    """
    raw = _distinct([each for each in candidates if not each.averaged])
    averaged = _distinct([each for each in candidates if each.averaged])
    if choice is None and raw and averaged and len(_distinct([raw[0], *averaged])) > 1:
        raise ConfigError(
            f"checkpoint {file} holds raw weights under {_names(raw)} and averaged ones (EMA) "
            f"under {_names(averaged)}, and they differ.",
            hint="Beside `checkpoint`, set `checkpoint_weights: averaged` (usually the better "
            "ones, and those that training scripts evaluate) or `checkpoint_weights: raw`.",
        )
    pool = averaged if choice == "averaged" else raw
    pool = pool or (averaged if choice is None else [])
    if not pool:
        other, there = ("raw", raw) if choice == "averaged" else ("averaged", averaged)
        under = "" if there[0].name == TOP else f" under {_names(there)}"
        raise ConfigError(
            f"checkpoint {file} holds no {choice} weights, only {other} ones{under}.",
            hint="Leave `checkpoint_weights` out to load those.",
        )
    if len(pool) > 1:
        kind = "several averages of the weights" if pool[0].averaged else "several networks"
        hint = f"set `checkpoint_key` to one of them, such as `checkpoint_key: {pool[0].name}`."
        if pool[0].averaged and raw:
            hint = f"{hint.rstrip('.')}, or `checkpoint_weights: raw`."
        raise ConfigError(
            f"checkpoint {file} holds {kind} that fit and differ: {_names(pool)}.",
            hint=f"Beside `checkpoint`, {hint}",
        )
    return pool[0]


def _names(candidates: Sequence[Weights]) -> str:
    return ", ".join(repr(each.name) for each in candidates)


def _distinct(candidates: Sequence[Weights]) -> list[Weights]:
    """Without those that equal an earlier one."""
    kept: list[Weights] = []
    for each in candidates:
        if not any(_equal(each.tensors, other.tensors) for other in kept):
            kept.append(each)
    return kept


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _nearest(found: Sequence[StateDict], expected: Mapping[str, Any]) -> Weights:
    """The state dict and the prefix that hold most of the network's names, for the message."""
    largest = max(found, key=lambda state: len(state.tensors))
    best = Weights(largest.place, "", largest.tensors, largest.averaged)
    needed = _needed(expected)
    most = len(needed) // 2  # a prefix that explains less is a coincidence
    probes = dict.fromkeys([*needed[:1], *needed[len(needed) // 2 :][:1], *needed[-1:]])
    for state in found:
        keys = [key for key in state.tensors for probe in probes if key.endswith(probe)]
        prefixes = {key.removesuffix(probe) for key in keys for probe in probes}
        for prefix in sorted(p for p in prefixes | {""} if not p or p.endswith(".")):
            hits = sum(prefix + key in state.tensors for key in needed)
            if hits > most:
                below = _below(state.tensors, prefix, expected)
                averaged = _is_average(state, prefix)
                best, most = Weights(state.place, prefix, below, averaged), hits
    return best


def _needed(expected: Mapping[str, Any]) -> list[str]:
    return [key for key in expected if not key.endswith(BATCH_COUNTER)] or list(expected)


def _no_tensors(file: Path, content: object) -> ConfigError:
    """The refusal of a file without a single tensor."""
    hint = "Save model.state_dict()."
    if not isinstance(content, Mapping) or not content:
        kind = "an empty dict" if content == {} else f"a {type(content).__name__}"
        problem = f"holds {kind} where a state dict is needed."
    else:
        items = [f"{key!r} is a {type(value).__name__}" for key, value in content.items()]
        more = f" (and {len(items) - 3} more)" if len(items) > 3 else ""
        problem = f"holds no tensors: {', '.join(items[:3])}{more}."
    return ConfigError(f"checkpoint {file} {problem}", hint=hint)


def _misfit(file: Path, model: nn.Module, nearest: Weights, model_name: str) -> ConfigError:
    """The refusal of weights that do not fit, with the name of a network that they fit."""
    expected = model.state_dict()
    problems = _misfits(expected, nearest.tensors)
    where = "" if nearest.name == TOP else f" under {nearest.name!r}"
    return ConfigError(
        f"checkpoint {file} does not fit {type(model).__name__}:{where} it {', '.join(problems)}.",
        hint=_misfit_hint(expected, nearest.tensors, model_name),
    )


def _misfit_hint(
    expected: Mapping[str, Any], weights: Mapping[str, Tensor], model_name: str
) -> str:
    """What is known of weights that do not fit: of other numbers, classes, or another network."""
    if not _other_layout(expected, weights):
        return "Give the weights as they were trained, in floating point numbers."
    shapes = {key: value.shape for key, value in expected.items() if isinstance(value, Tensor)}
    if weights.keys() == shapes.keys():
        num_classes = other_outputs(weights, shapes)
        if num_classes is not None:
            return (
                f"It is of the same network with {num_classes} outputs. For a teacher, set "
                f"teacher.num_classes: {num_classes}, and choose among them with teacher.classes."
            )
    others = find_lookalikes(weights, model_name)
    if others:
        names = " or ".join(each.name for each in others[:3])
        return f"It fits {names} with {others[0].num_classes} classes: name that as the model."
    return "Check the model's name, num_classes and model_args."


def _misfits(expected: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
    """How weights differ from a network's state dict in names, shapes and kinds of numbers."""
    shared = [
        (key, wanted, weights[key])
        for key, wanted in expected.items()
        if key in weights and isinstance(wanted, Tensor)
    ]
    empty = [key for key, _, found in shared if found.is_meta]
    rounded = [
        f"{key} as {str(found.dtype).removeprefix('torch.')}"
        for key, wanted, found in shared
        if wanted.is_floating_point() and (found.is_quantized or not found.is_floating_point())
    ]
    return [
        *_other_layout(expected, weights),
        *_first("holds no values of", empty),
        *_first("holds", rounded),
    ]


def _other_layout(expected: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
    """How weights differ from a network's state dict in names and shapes."""
    missing = [key for key in expected if key not in weights and not key.endswith(BATCH_COUNTER)]
    unknown = [key for key in weights if key not in expected]
    other = [
        f"{key} is {list(weights[key].shape)} in the file and {list(wanted.shape)} in the network"
        for key, wanted in expected.items()
        if key in weights and isinstance(wanted, Tensor) and weights[key].shape != wanted.shape
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
