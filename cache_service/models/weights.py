"""Weights of a network, read from a file that must fit.

No file is ever unpickled as code: .safetensors, or torch's files with weights_only.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cache_service.errors import ConfigError
from cache_service.format.spec import Preprocess
from cache_service.models.averaged import WeightsChoice, choose_weights, find_weights

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


def load_checkpoint(
    model: nn.Module, path: str | Path, *, weights: WeightsChoice | None = None
) -> str:
    """Load weights from a file into the network, all of them or none.

    Args:
        model: changed in place; its dtype and device stay.
        path: .safetensors, or anything `torch.load` reads with weights_only. A state dict below
            `state_dict` or `model` is found, and the keys' `module.` is taken off.
        weights: which to load from a file that holds the network's raw weights and averaged ones
            (EMA, SWA) beside them. Without it such a file is refused.

    Returns:
        What was loaded, for people: "averaged weights, state_dict_ema of best.pth".

    Raises:
        ConfigError: the file is missing, unreadable or of another network, or it does not hold the
            weights that were asked for, or holds two kinds and none was asked for.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"checkpoint {file} is not a file.", hint="Check the path.")
    chosen = choose_weights(file, find_weights(file, _read(file)), weights)
    _require_fit(file, model, chosen.tensors)
    try:
        model.load_state_dict(chosen.tensors)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"checkpoint {file} cannot be loaded into {type(model).__name__}: {one_line(error)}"
        ) from error
    kind = "averaged" if chosen.averaged else "raw"
    return f"{kind} weights, {chosen.key} of {file.name}" if chosen.key else f"{file.name}"


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
