"""What a user's pipeline keeps from one call to the next: found by looking through its attributes.

`kept_state` lists everything that is reachable from a pipeline: attributes, items of containers,
variables of closures, and the globals that its functions use. Each has a name as its user would
write it, such as `Compose.transforms[0].random_generator`, and a digest of its value. Two lists
from before and after a call tell what changed.
"""

from __future__ import annotations

import functools
import itertools
import random
import types
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from PIL import Image

MAX_OBJECTS = 20_000
"""Objects that are looked at. A pipeline with a whole network in it has fewer modules."""

MAX_DEPTH = 50

MAX_DIGEST_BYTES = 1 << 20
"""Larger arrays are sampled: a pipeline may hold a memory map of backgrounds."""

LIBRARIES = frozenset(
    {"PIL", "albucore", "albumentations", "builtins", "collections", "cv2", "enum", "functools"}
    | {"inspect", "itertools", "numpy", "pathlib", "random", "timm", "torch", "torchvision"}
    | {"types", "typing"}
)
"""Packages whose classes hold no state of a user's pipeline; their instances may."""

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)

_GLOBAL_GENERATORS = (
    random.random.__self__,  # type: ignore[attr-defined]
    np.random.random.__self__,  # type: ignore[attr-defined]
    torch.default_generator,
)
"""These are seeded for each view, so they keep nothing."""

_LEAVES = (*GENERATORS, np.ndarray, torch.Tensor, Image.Image, itertools.count)
_ATOMS = (int, float, complex, str, bytes, bool, type(None))
_SKIPPED = (types.ModuleType, type, types.BuiltinFunctionType, types.CodeType)


def reachable(pipeline: object) -> Iterator[tuple[str, object]]:
    """Name and object of everything that a pipeline holds, itself included, nearest first."""
    root = getattr(pipeline, "__name__", None) or type(pipeline).__name__
    seen: set[int] = set()
    waiting: deque[tuple[str, object, int]] = deque([(str(root), pipeline, 0)])
    while waiting and len(seen) < MAX_OBJECTS:
        name, here, depth = waiting.popleft()
        if isinstance(here, _ATOMS):
            yield name, here
            continue
        is_known = id(here) in seen or any(here is each for each in _GLOBAL_GENERATORS)
        if is_known or isinstance(here, _SKIPPED):
            continue
        seen.add(id(here))
        yield name, here
        if not isinstance(here, _LEAVES) and depth < MAX_DEPTH:
            try:
                waiting.extend((below, each, depth + 1) for below, each in _below(name, here))
            except Exception:  # noqa: BLE001, S112 - lazy proxies; a name is lost, nothing else
                continue


def kept_state(pipeline: object) -> dict[str, tuple[object, str]]:
    """Name -> (object, digest of its value) of everything reachable from a pipeline."""
    found: dict[str, tuple[object, str]] = {}
    for name, each in reachable(pipeline):
        # An attribute of an object hides one of the same name of its class, which comes later.
        if isinstance(each, (*_ATOMS, *_LEAVES)) and name not in found:
            found[name] = each, _digest(each)
    return found


def generator_states(pipeline: object) -> dict[str, str]:
    """The states of the random generators that are reachable from a pipeline, by name."""
    return {
        name: _digest(each) for name, each in reachable(pipeline) if isinstance(each, GENERATORS)
    }


def held_iterators(pipeline: object) -> list[str]:
    """Iterators that a pipeline holds. They keep their place, which cannot be looked at."""
    return [
        f"{name} ({_kind(each)})"
        for name, each in reachable(pipeline)
        if isinstance(each, Iterator) and not isinstance(each, _LEAVES)
    ]


def describe_changes(
    before: dict[str, tuple[object, str]], after: dict[str, tuple[object, str]], *, most: int = 3
) -> list[str]:
    """Name what changed between two calls of `kept_state`, random generators first."""
    changed = [name for name in after if name in before and before[name][1] != after[name][1]]
    added = [name for name in after if name not in before]
    names = sorted(changed, key=lambda name: not isinstance(after[name][0], GENERATORS)) + added
    return [f"{name} ({_kind(after[name][0])})" for name in names[:most]]


def _kind(value: object) -> str:
    kind = type(value)
    module = "numpy" if kind.__module__.startswith("numpy") else kind.__module__.partition(".")[0]
    return kind.__name__ if module == "builtins" else f"{module} {kind.__name__}"


def _digest(value: Any) -> str:
    if isinstance(value, torch.Generator):
        value = value.get_state()
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy() if value.layout is torch.strided else repr(value)
    if isinstance(value, Image.Image):
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        step = max(1, value.nbytes // MAX_DIGEST_BYTES)
        return f"{value.dtype} {value.shape} {crc32(value.reshape(-1)[::step].tobytes())}"
    if isinstance(value, np.random.Generator):
        value = value.bit_generator.state
    elif isinstance(value, np.random.RandomState):
        state: dict[str, Any] = value.get_state(legacy=False)
        value = state["state"]["pos"], state["state"]["key"].tobytes()
    elif isinstance(value, random.SystemRandom):
        value = "the system's entropy, which has no state"
    elif isinstance(value, random.Random):
        value = value.getstate()
    return str(crc32(repr(value).encode()))


def _below(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The objects that an object holds, each with its name."""
    if isinstance(value, dict):
        yield f"len({name})", len(value)
        yield from ((f"{name}[{key!r}]", item) for key, item in list(value.items()))
    elif isinstance(value, list | tuple | deque):
        yield f"len({name})", len(value)
        yield from ((f"{name}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield f"len({name})", len(value)
    elif isinstance(value, functools.partial):
        yield from _below_call(name, value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        yield name, value.__self__
        yield name, value.__func__
    elif isinstance(value, types.FunctionType):
        yield from _of_function(name, value)
    else:
        yield from _of_instance(name, value)


def _below_call(name: str, *parts: Any) -> Iterator[tuple[str, Any]]:
    function, arguments, keywords = parts
    yield name, function
    yield f"{name}.args", arguments
    yield f"{name}.keywords", keywords


def _of_function(name: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    if _is_library(function.__module__):
        return
    for variable, cell in zip(
        function.__code__.co_freevars, function.__closure__ or (), strict=True
    ):
        try:
            yield f"{name}.{variable}", cell.cell_contents
        except ValueError:  # a variable without a value yet
            continue
    yield from ((f"{name}.{key}", each) for key, each in vars(function).items())
    yield f"{name} defaults", (function.__defaults__, function.__kwdefaults__)
    for used in _names_in(function.__code__):
        if used in function.__globals__:
            file = Path(function.__code__.co_filename).name
            yield f"{file}:{used}", function.__globals__[used]


def _names_in(code: types.CodeType) -> Iterator[str]:
    """Names of globals that a function uses, its inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _of_instance(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    yield from (
        (f"{name}.{key}", each) for key, each in list(getattr(value, "__dict__", {}).items())
    )
    for owner in kind.__mro__:
        slots = owner.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in {"__dict__", "__weakref__"} and hasattr(value, slot):
                yield f"{name}.{slot}", getattr(value, slot)
        if _is_library(owner.__module__):
            continue
        for key, each in list(vars(owner).items()):
            is_value = not key.startswith("__") and not hasattr(each, "__get__")
            if is_value or isinstance(each, types.FunctionType):
                yield f"{name}.{key}", each


def _is_library(module: str | None) -> bool:
    return module is None or module.partition(".")[0] in LIBRARIES
