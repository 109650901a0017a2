"""Reads the content of a checkpoint file without running code from it.

.safetensors, or torch's files with weights_only. A file that is no checkpoint, such as a Git LFS
pointer, is named as what it is before anything is unpickled.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cache_service.errors import ConfigError
from cache_service.human_format import one_line


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


def read_checkpoint(file: Path) -> object:
    """What a checkpoint file holds, its tensors on the CPU.

    Raises:
        ConfigError: the file is missing, damaged or of another kind, or unpickling it could run
            code.
    """
    if not file.is_file():
        raise ConfigError(f"checkpoint {file} is not a file.", hint="Check the path.")
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
