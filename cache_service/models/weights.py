"""Weights of a network: read from a file that must fit, and named by a digest.

No file is ever unpickled as code: .safetensors, or torch's files with weights_only.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cache_service.errors import ConfigError
from cache_service.format.spec import Preprocess

NESTED_UNDER = ("state_dict", "model", "model_state_dict")
"""Keys under which training scripts put the weights, beside their optimizer and epoch."""

BROKEN = (
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
"""What readers of damaged files have been seen to raise, and their kin."""

WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put in front of every key."""


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load weights from a file into the network, all of them or none.

    Args:
        model: changed in place; its dtype and device stay.
        path: .safetensors, or anything `torch.load` reads with weights_only. A state dict below
            `state_dict` or `model` is found, and the keys' `module.` is taken off.

    Raises:
        ConfigError: the file is missing, unreadable or of another network.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"checkpoint {file} is not a file.", hint="Check the path.")
    weights = _without_wrappers(_state_dict(file, _read(file)))
    _require_fit(file, model, weights)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"checkpoint {file} cannot be loaded into {type(model).__name__}: {one_line(error)}"
        ) from error


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over every entry of the state dict: name, dtype, shape and bytes, sorted by name.

    Memory format, device and compilation do not change it; one bit of one weight does.
    """
    digest = hashlib.sha256()
    named = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    for name, value in sorted(named.items()):
        dtype = str(value.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, dtype, list(value.shape)]).encode() + b"\n")
        # Bytes, because numpy has no bfloat16; flat, because a scalar has no last axis to split.
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """The first line of what another library says, as a sentence; its class if it says nothing."""
    lines = str(error).strip().splitlines()
    first = lines[0].rstrip() if lines else type(error).__name__
    return first if first.endswith((".", "!", "?")) else f"{first}."


def _read(file: Path) -> object:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():
            # Torch remarks on the pickle protocol; whether the weights load is what counts.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"checkpoint {file} is not plain weights, and unpickling anything else can run code.",
            hint="Save model.state_dict() alone, best with safetensors.torch.save_file.",
        ) from error
    except BROKEN as error:
        raise ConfigError(f"checkpoint {file} cannot be read: {one_line(error)}") from error


def recorded_preprocess(path: str | Path) -> Preprocess | None:
    """What the network of a .safetensors file was fed, where the file says so; ours do.

    Raises:
        ConfigError: the file cannot be read, or says it in words that mean nothing.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            told = (opened.metadata() or {}).get("preprocess")
        return None if told is None else Preprocess.model_validate_json(told)
    except (*BROKEN, ValidationError) as error:
        raise ConfigError(f"checkpoint {file} cannot be read: {one_line(error)}") from error


def _state_dict(file: Path, content: object) -> dict[str, Tensor]:
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
    return dict(content)


def _without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in (*WRAPPERS, *WRAPPERS):  # they nest, in either order
        if all(key.startswith(wrapper) for key in weights):
            weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    return weights


def _require_fit(file: Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    wanted = model.state_dict()
    # Batch norms of torch < 0.4.1 did not count their batches; torch fills that in.
    counters = ".num_batches_tracked"
    missing = [key for key in wanted if key not in weights and not key.endswith(counters)]
    unknown = [key for key in weights if key not in wanted]
    other = [
        f"{key} is {list(weights[key].shape)} in the file and {list(value.shape)} in the network"
        for key, value in wanted.items()
        if key in weights and weights[key].shape != value.shape
    ]
    problems = [
        *_first("lacks", missing),
        *_first("has the unknown", unknown),
        *_first("differs in shape:", other),
    ]
    if problems:
        raise ConfigError(
            f"checkpoint {file} does not fit {type(model).__name__}: it {', '.join(problems)}.",
            hint="Check the model's name, num_classes and model_args.",
        )


def _first(problem: str, cases: list[str]) -> list[str]:
    if not cases:
        return []
    more = f" (and {len(cases) - 1} more)" if len(cases) > 1 else ""
    return [f"{problem} {cases[0]}{more}"]
