"""What identifies the weights of a network: a digest over everything that they consist of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cache_service.errors import UnsupportedError

OWN_DIGEST = "weights_digest"
"""Attribute or method by which a network names weights that live outside of torch."""

MAX_DEPTH = 8
"""Of containers within containers that are searched for tensors."""

REGISTERED = ("_parameters", "_buffers", "_modules")
_OPAQUE = (type, ModuleType, FunctionType, MethodType, partial)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over every entry of the state dict: name, dtype, shape and bytes, sorted by name.

    Memory format, device and compilation do not change it; one bit of one weight does. Tensors
    that the state dict does not hold are added where there are any (see `hidden_tensors`), and so
    is the attribute or method `weights_digest` of the network, a string such as the SHA-256 of an
    ONNX file. Call it before the network has run: some networks keep tensors of their last run.

    Raises:
        UnsupportedError: the state dict is empty and the network has no `weights_digest`. Weights
            outside a state dict cannot be found reliably, so nothing identifies the network.
    """
    digest = hashlib.sha256()
    state = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name, value in sorted(tensors.items()):
        _add(digest, name, value)
    for name, value in sorted(hidden_tensors(model).items()):
        _add(digest, f"hidden:{name}", value)
    own = _own_digest(model)
    if own is not None:
        digest.update(json.dumps([OWN_DIGEST, own]).encode() + b"\n")
    if not tensors and own is None:
        raise UnsupportedError(
            f"the state dict of {type(model).__name__} is empty, so its recording could not be "
            "distinguished from that of another network.",
            hint="Register its weights as parameters or buffers, or give the network an attribute "
            f"{OWN_DIGEST}, such as the SHA-256 of its file.",
        )
    return digest.hexdigest()


def hidden_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors and arrays that `state_dict` leaves out, by where they are.

    Searched are parameters that a state dict of the network's own leaves out, and the attributes of
    every module: lists, tuples, mappings and objects in them, and modules found there. Buffers that
    are registered as not persistent are left out: they follow from the constructor's arguments. So
    are aliases of what the state dict holds.
    """
    seen = {id(module) for module in model.modules()}
    known = [*model.state_dict(keep_vars=True).values(), *model.buffers()]
    places = {_place(value) for value in known if isinstance(value, Tensor)}
    found: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        found |= _search_module(module, name, seen)
    return {path: tensor for path, tensor in found.items() if _place(tensor) not in places}


def _search_module(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    for attribute, value in vars(module).items():
        if attribute not in REGISTERED:
            yield from _search(value, f"{name}.{attribute}".lstrip("."), seen, 0)


def _search(value: Any, path: str, seen: set[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, str | bytes | int | float | complex | None) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        yield path, torch.from_numpy(np.ascontiguousarray(value))
    elif isinstance(value, nn.Module):
        tensors = {**dict(value.named_parameters()), **dict(value.named_buffers())}
        for name, tensor in tensors.items():
            yield from _search(tensor, f"{path}.{name}", seen, 0)
        for name, module in value.named_modules():
            seen.add(id(module))
            yield from _search_module(module, f"{path}.{name}".rstrip("."), seen)
    elif depth < MAX_DEPTH:
        for key, item in _items(value):
            yield from _search(item, f"{path}.{key}", seen, depth + 1)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif hasattr(value, "__dict__") and not isinstance(value, _OPAQUE):
        foreign = type(value).__module__.partition(".")[0]
        if foreign not in ("torch", "builtins"):  # torch.compile's own state leads everywhere
            yield from vars(value).items()


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], torch.dtype]:
    """What two names of one tensor have in common."""
    address = tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)
    return address, tuple(tensor.shape), tensor.dtype


def _own_digest(model: nn.Module) -> str | None:
    own = getattr(model, OWN_DIGEST, None)
    if callable(own):
        own = own()
    if own is None:
        return None
    if isinstance(own, bytes):
        own = own.hex()
    if not isinstance(own, str) or not own:
        raise UnsupportedError(
            f"{OWN_DIGEST} of {type(model).__name__} is a {type(own).__name__}, not a string.",
            hint="Return the SHA-256 of the file with the weights as text.",
        )
    return own


def _add(digest: Any, name: str, value: Tensor) -> None:
    dtype = str(value.dtype).removeprefix("torch.")
    digest.update(json.dumps([name, dtype, list(value.shape)]).encode() + b"\n")
    # Bytes, because numpy has no bfloat16; flat, because a scalar has no last axis to split.
    dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
    flat = dense.cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
