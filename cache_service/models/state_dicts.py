"""The state dicts in the content of a checkpoint, wherever training scripts put them."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from cache_service.models.checkpoint_file import StandIn

AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|polyak|avg|averaged?)([^a-z]|$)|^ema|ema$")
"""Names of averaged weights, in lower case: state_dict_ema, model_ema, ema, swa_state_dict, ..."""

COUNTERS = ("n_averaged", "steps")
"""What averagers of torch and of OpenMMLab put beside the weights."""

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that DataParallel, AveragedModel, torch.compile, FSDP and activation checkpointing put into
the names of weights."""

CONTAINERS = (Mapping, list, tuple, StandIn)
MAX_DEPTH = 6
MAX_CONTAINERS = 1_000_000
"""Of a checkpoint's content, searched for state dicts."""

MAX_VISITS = 4
"""Names by which one container of a file is found; a container may hold itself."""


class StateDict(NamedTuple):
    """Tensors by name, as they were found in a checkpoint."""

    place: str
    """The keys that lead there, joined by dots: `state_dict`, `ema.shadow`; empty at the top."""
    tensors: dict[str, Tensor]
    averaged: bool


def names_average(part: str) -> bool:
    """Whether a key or a part of a name says that the weights are averaged."""
    return AVERAGED.search(part.lower()) is not None


def find_state_dicts(content: object, expected: Mapping[str, Any]) -> Iterator[StateDict]:
    """Every mapping of a checkpoint's content that holds tensors, from the outside to the inside.

    Wrappers' parts are taken out of the names, unless the network itself has such parts. Lists of
    tensors, in which averagers keep parameters in order, are found too, with numbers as names.
    """
    own = {part for key in expected for part in key.split(".")}
    wrappers = {part for part in WRAPPERS if part not in own}
    # Two trainers put the average where others have the raw weights, and the raw ones elsewhere.
    swapped = _swapped(content)
    for keys, tensors in _search(content):
        place = ".".join(part for part in keys if part not in wrappers) or ".".join(keys)
        names = _without_wrappers(tensors, wrappers)
        counted = any(counter in names and counter not in own for counter in COUNTERS)
        averaged = counted or any(names_average(part) for part in keys)
        if keys and keys[0] in swapped:
            averaged = swapped[keys[0]]
        yield StateDict(place, names, averaged)


def _search(content: object) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """(keys, tensors) of every mapping, pickled network and list of tensors, the outer ones first.

    States of optimizers are passed over: some hold a tensor for each weight, under its name.
    """
    waiting: deque[tuple[tuple[str, ...], object]] = deque([((), content)])
    visits: Counter[int] = Counter()
    for _ in range(MAX_CONTAINERS):
        if not waiting:
            return
        keys, value = waiting.popleft()
        visits[id(value)] += 1
        if visits[id(value)] > MAX_VISITS:
            continue
        if isinstance(value, StandIn):
            items: dict[str, object] = dict(_pickled_network(value))
        elif isinstance(value, Mapping):
            items = {str(key): item for key, item in value.items()}
        elif isinstance(value, list | tuple):
            items = {str(number): item for number, item in enumerate(value)}
        else:
            continue
        tensors = {key: item for key, item in items.items() if isinstance(item, Tensor)}
        if tensors:
            yield keys, tensors
        if len(keys) < MAX_DEPTH:
            waiting += [
                ((*keys, key), item)
                for key, item in items.items()
                if isinstance(item, CONTAINERS) and not key.startswith("optim")
            ]


def _pickled_network(network: StandIn) -> Iterator[tuple[str, Tensor]]:
    """The state dict of a network that was pickled whole, from what was read of it as data."""
    waiting = deque([("", network)])
    for _ in range(MAX_CONTAINERS):
        if not waiting:
            return
        prefix, module = waiting.popleft()
        state = module.state or {}
        not_saved = state.get("_non_persistent_buffers_set") or ()
        named = {**state.get("_parameters", {}), **state.get("_buffers", {})}
        for name, value in named.items():
            if isinstance(value, Tensor) and name not in not_saved:
                yield f"{prefix}{name}", value
        for name, child in state.get("_modules", {}).items():
            if isinstance(child, StandIn):
                waiting.append((f"{prefix}{name}.", child))


def _swapped(content: object) -> dict[str, bool]:
    """Whether weights are averaged, by key, for the trainers whose names say the opposite.

    Lightning's WeightAveraging and OpenMMLab's EMAHook save the average as `state_dict`, for use,
    and the raw weights, for resuming, as `current_model_state` and `ema_state_dict`.
    """
    if not isinstance(content, Mapping):
        return {}
    if "current_model_state" in content and "averaging_state" in content:
        return {"state_dict": True, "current_model_state": False}
    ema = content.get("ema_state_dict")
    if "state_dict" in content and isinstance(ema, Mapping) and "steps" in ema:
        return {"state_dict": True, "ema_state_dict": False}
    return {}


def _without_wrappers(tensors: dict[str, Tensor], wrappers: set[str]) -> dict[str, Tensor]:
    bare = {
        ".".join(part for part in key.split(".") if part not in wrappers): value
        for key, value in tensors.items()
    }
    return bare if len(bare) == len(tensors) else tensors  # two networks, one of them wrapped
