"""Weights of a network: read from a file that must fit, chosen, and named by a digest.

No file is ever unpickled as code: .safetensors, or torch's files with weights_only. A file that is
no checkpoint, such as a Git LFS pointer, is named as what it is before anything is unpickled.

Training scripts save an average of the weights (EMA, SWA) beside the raw ones. Both fit the
network, and the averaged ones usually classify better, so neither is loaded by accident.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cache_service.errors import ConfigError, UnsupportedError

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


class _Bystander:
    """Stands in for an object beside the weights, whose content is not needed."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# The names that a pickle may use map to empty classes, so that no constructor of NumPy runs on
# values from the file: a dtype whose flags were forged would let NumPy read any address.
_BYSTANDERS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (type(name.rpartition(".")[2], (_Bystander,), {}), name)
    for name in (
        "argparse.Namespace",
        "numpy.dtype",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray.scalar",  # as NumPy 1 wrote it
    )
]

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml")

MAX_SAFETENSORS_HEADER = 100_000_000
"""Bytes; the format's own limit. A longer header means that the file is of another format."""

BATCH_COUNTER = ".num_batches_tracked"
"""Batch norms of torch < 0.4.1 did not count their batches; torch fills that in."""

UNREADABLE = (
    SafetensorError,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
)
"""What reading a damaged file raises: errors that were seen, and their relatives."""

OWN_DIGEST = "weights_digest"
"""Attribute or method by which a network names weights that live outside of torch."""

MAX_DEPTH = 8
"""Of containers within containers that are searched for tensors."""

REGISTERED = ("_parameters", "_buffers", "_modules")
_OPAQUE = (type, ModuleType, FunctionType, MethodType, partial)


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
    if not file.is_file():
        raise ConfigError(f"checkpoint {file} is not a file.", hint="Check the path.")
    chosen = choose_weights(file, find_weights(file, _read(file), model), weights)
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


def _read(file: Path) -> object:
    try:
        refusal = _other_file(file)
        if refusal is not None:
            raise refusal
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_BYSTANDERS):
            # torch warns about the pickle protocol; it does not matter if the weights load.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unpicklable(file, error) from error
    except UNREADABLE as error:
        if "weights_only" in str(error):
            raise _unpicklable(file, error) from error
        raise ConfigError(f"checkpoint {file} cannot be read: {one_line(error)}") from error


def _other_file(file: Path) -> ConfigError | None:
    """The refusal of a file whose first bytes or length show that it is no whole checkpoint."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(1024)
    again = "Download or copy the file again, and compare its size with the source."
    if not size:
        return ConfigError(f"checkpoint {file} is empty (0 bytes).", hint=again)
    if head.startswith(LFS_POINTER):
        return ConfigError(
            f"checkpoint {file} is a Git LFS pointer, a text of {size} bytes that only names the "
            "weights.",
            hint="Run `git lfs install` and `git lfs pull` in the repository that it comes from.",
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(PAGES):
        return ConfigError(
            f"checkpoint {file} is an HTML or XML page, such as a server sends in place of a file.",
            hint="Open the page in a browser to see what the server said, then download the "
            "checkpoint again from its direct link, logged in if need be.",
        )
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(file):
        return ConfigError(
            f"checkpoint {file} is truncated: its {size} bytes begin as a zip archive of "
            "torch.save, but the directory at its end is missing.",
            hint=again,
        )
    needed = _safetensors_size(file) if file.suffix == ".safetensors" else None
    if needed is not None and size < needed:
        return ConfigError(
            f"checkpoint {file} is truncated: it has {size} bytes, and its safetensors header "
            f"needs {needed} or more.",
            hint=again,
        )
    return None


def _safetensors_size(file: Path) -> int | None:
    """Bytes that the header of a safetensors file announces; None if it has no such header."""
    with file.open("rb") as stream:
        head = stream.read(9)
        length = int.from_bytes(head[:8], "little")
        if head[8:] != b"{" or length > MAX_SAFETENSORS_HEADER:
            return None
        header = b"{" + stream.read(length - 1)
    if len(header) < length:
        return 8 + length
    try:
        entries = json.loads(header)
        ends = [each["data_offsets"][1] for key, each in entries.items() if key != "__metadata__"]
        return 8 + length + int(max(ends, default=0))
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None  # load_file says what is wrong with the header


def _unpicklable(file: Path, error: Exception) -> ConfigError:
    # torch's own text advises weights_only=False, so nothing but the name is taken from it.
    again = ""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named is not None:
        name = named[1] if "." in named[1] else f"builtins.{named[1]}"  # as torch shortens it
        problem = f"it holds {name}, and unpickling that can run code"
    elif "TorchScript" in str(error):
        problem = "it is a TorchScript archive, which holds a program"
    else:
        problem = "it is damaged, or torch.save did not write it"
        again = "Download it again if it was downloaded. "
    return ConfigError(
        f"checkpoint {file} is not plain weights: {problem}.",
        hint=f"{again}In the program that wrote the checkpoint, save model.state_dict() alone, "
        "best with safetensors.torch.save_file.",
    )


def one_line(error: BaseException) -> str:
    """The first line of what another library says, as a sentence; its class if it says nothing."""
    lines = str(error).strip().splitlines()
    first = lines[0].rstrip() if lines else type(error).__name__
    return first if first.endswith((".", "!", "?")) else f"{first}."


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
