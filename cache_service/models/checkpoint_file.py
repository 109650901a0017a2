"""Reads the content of a checkpoint, a file or a folder, without running code from it.

.safetensors, or torch's files with weights_only. What such a file holds beside tensors becomes an
empty stand-in of its class, so that no class or function that a file names is ever imported. A file
that is no checkpoint, such as a Git LFS pointer, is named as what it is before it is unpickled.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cache_service.errors import ConfigError
from cache_service.human_format import one_line

FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "student.safetensors",
)
"""Files of weights in folders of transformers, accelerate and this project, the preferred first."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar", ".t7")
NO_WEIGHTS = re.compile(r"^(optimizer|scheduler|scaler|sampler|random_states|training_args|rng_)")
"""Names of files that training scripts put beside the weights."""

ZIP = b"PK\x03\x04"
PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
FOREIGN = (
    (0, b"\x1f\x8b", "is compressed by gzip", "Unpack it first."),
    (0, b"BZh", "is compressed by bzip2", "Unpack it first."),
    (0, b"\xfd7zXZ\x00", "is compressed by xz", "Unpack it first."),
    (0, b"\x28\xb5\x2f\xfd", "is compressed by zstd", "Unpack it first."),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "Unpack it first."),
    (0, b"Rar!", "is a RAR archive", "Unpack it first."),
    (257, b"ustar", "is a tar archive", "Unpack it first."),
    (0, b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras writes it", ""),
    (0, b"GGUF", "is a GGUF file", ""),
    (0, b"\x93NUMPY", "is a NumPy array", ""),
)
"""(offset, first bytes, what the file is, what to do) of files that are taken for checkpoints."""

AGAIN = "Download or copy the file again, and compare its size with the source."
SAVE_AGAIN = "Load it in the program that made it, and save model.state_dict() with torch.save."

MAX_SAFETENSORS_HEADER = 100_000_000
"""Bytes; the format's own limit. A longer header means that the file is of another format."""

MAX_ROUNDS = 64
"""Attempts at one pickle; each names one more class that needs a stand-in."""

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


class StandIn:
    """Stands in for an object beside the weights. `state` is kept only of a pickled network."""

    state: Mapping[str, Any] | None = None

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, Mapping) and {"_parameters", "_buffers", "_modules"} <= state.keys():
            self.state = state


class _MappingStandIn(StandIn):
    def __new__(cls, *_: object) -> Any:
        return OrderedDict()  # the unpickler fills no other mapping


class _ListStandIn(StandIn):
    def __new__(cls, *_: object) -> Any:
        return []


MAPPINGS = ("collections.defaultdict", "easydict.EasyDict", "addict.addict.Dict")
"""Classes of mappings without a capital letter, or that are known to be mappings."""

HARMLESS_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "functools",
    "collections",
    "datetime",
)
"""Their functions are passed over, too: pickled networks and NumPy's arrays and scalars name them.
Functions of other packages are refused by name, because weights have no use for them."""

PLAIN_TYPES = ("list", "dict", "tuple", "set", "frozenset", "str", "bytes", "int", "float", "bool")


def checkpoint_path(path: str | Path) -> Path:
    """The file of a checkpoint that may be given as a folder.

    A folder of transformers, accelerate or a run of this project holds its weights under a known
    name. Of any other folder, the only file of weights is taken.

    Raises:
        ConfigError: there is no such file or folder, or the folder holds none or several.
    """
    file = Path(path)
    if file.is_file():
        return file
    if not file.is_dir():
        raise ConfigError(f"checkpoint {file} is not a file.", hint="Check the path.")
    if (file / ".metadata").is_file():
        raise ConfigError(
            f"checkpoint {file} is a sharded checkpoint of torch.distributed.",
            hint="Convert it by `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            "FOLDER FILE`, and give the file.",
        )
    named = [file / name for name in FOLDER_FILES if (file / name).is_file()]
    others = [each for each in file.glob("model_*.safetensors") if named]
    weights = [
        each
        for each in sorted(file.iterdir())
        if each.suffix in WEIGHT_SUFFIXES and each.is_file() and not NO_WEIGHTS.match(each.name)
    ]
    if named and not others:
        return named[0]
    found = [*named[:1], *sorted(others)] or weights
    if len(found) == 1:
        return found[0]
    names = ", ".join(each.name for each in found[:4]) + ", ..." * (len(found) > 4)
    raise ConfigError(
        f"checkpoint {file} is a folder with {'several files' if found else 'no file'} of weights"
        f"{f': {names}' if found else ''}.",
        hint="Give the path of the file.",
    )


def read_checkpoint(file: Path) -> object:
    """What a checkpoint file holds, its tensors on the CPU. Other objects are `StandIn`s.

    Raises:
        ConfigError: the file is damaged or of another kind, or names functions that have no place
            beside weights.
    """
    try:
        if file.name.endswith(".index.json"):
            return _read_shards(file)
        refusal = _other_file(file)
        if refusal is not None:
            raise refusal
        if is_safetensors(file):
            return load_file(file)
        return _unpickle(file)
    except UNREADABLE as error:
        raise ConfigError(f"checkpoint {file} cannot be read: {one_line(error)}") from error


def _read_shards(index: Path) -> dict[str, object]:
    """The tensors of all files that an index of transformers or accelerate lists."""
    names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    tensors: dict[str, object] = {}
    for name in names:
        shard = index.parent / Path(name).name
        if not shard.is_file():
            raise ConfigError(
                f"checkpoint {index} lists {name}, which is not beside it.",
                hint=f"The weights are in {len(names)} files; copy all of them.",
            )
        content = read_checkpoint(shard)
        tensors |= content if isinstance(content, dict) else {}
    return tensors


def is_safetensors(file: Path) -> bool:
    """By content: names lie. The suffix counts only for a file that is neither kind."""
    with file.open("rb") as stream:
        head = stream.read(4)
    if head == ZIP or head.startswith(b"\x80"):
        return False
    return file.suffix == ".safetensors" or _safetensors_size(file) is not None


def _unpickle(file: Path) -> object:
    stand_ins = {name: _stand_in(name) for name in _globals_of(file)}
    for _ in range(MAX_ROUNDS):
        allowed: list[Any] = [(kind, name) for name, kind in stand_ins.items() if kind]
        try:
            with (
                warnings.catch_warnings(),
                torch.serialization.safe_globals(allowed),
                file.open("rb") as stream,  # given a path, torch would go by its suffix
            ):
                # torch warns about the pickle protocol; it does not matter if the weights load.
                warnings.simplefilter("ignore", UserWarning)
                return torch.load(stream, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, *UNREADABLE) as error:
            if not _add_stand_in(stand_ins, str(error)):
                if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
                    raise _unpicklable(file, error) from error
                raise
    raise ConfigError(f"checkpoint {file} is not plain weights.", hint=SAVE_AGAIN)


def _globals_of(file: Path) -> list[str]:
    """Classes and functions that the pickle of a zip archive names; older files show none."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (pickle.UnpicklingError, *UNREADABLE):
        return []


def _add_stand_in(stand_ins: dict[str, type | None], problem: str) -> bool:
    """Prepare the next attempt by what stopped the last one; False if nothing helps."""
    named = re.search(r"Unsupported global: GLOBAL ([\w.]+)", problem)
    if named is not None:
        name = named[1] if "." in named[1] else f"builtins.{named[1]}"  # as torch shortens it
        if name in stand_ins:
            return False
        stand_ins[name] = _stand_in(name)
        return stand_ins[name] is not None
    filled = re.search(r"Can only (SETITEM|append).*but got <class '\S*?(\w+)'>", problem)
    if filled is None:
        return False
    kind = _MappingStandIn if filled[1] == "SETITEM" else _ListStandIn
    changed = [
        name
        for name, old in stand_ins.items()
        if old and old.__name__ == filled[2] and not issubclass(old, kind)
    ]
    for name in changed:
        stand_ins[name] = type(filled[2], (kind,), {})
    return bool(changed)


def _stand_in(name: str) -> type | None:
    """The class that stands in for a global; None for a function that has no place here.

    Classes are told by their capital letter. Nothing of the name is imported, so that not even a
    dtype with forged flags, which would let NumPy read any address, reaches NumPy.
    """
    package, last = name.partition(".")[0], name.rpartition(".")[2]
    if name in MAPPINGS:
        return type(last, (_MappingStandIn,), {})
    harmless = package in HARMLESS_PACKAGES or last.lstrip("_")[:1].isupper()
    if not harmless and not (package == "builtins" and last in PLAIN_TYPES):
        return None
    return type("ndarray" if last == "_reconstruct" else last, (StandIn,), {})


def _other_file(file: Path) -> ConfigError | None:
    """The refusal of a file whose first bytes or length show that it is no whole checkpoint."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(1024)
    for offset, magic, what, hint in FOREIGN:
        if head[offset:].startswith(magic):
            return ConfigError(f"checkpoint {file} {what}.", hint=hint or SAVE_AGAIN)
    if head.startswith(ZIP):
        return _other_archive(file)
    needed = _safetensors_size(file)
    if needed is not None and size < needed:
        return ConfigError(
            f"checkpoint {file} is truncated: it has {size} bytes, and its safetensors header "
            f"needs {needed} or more.",
            hint=AGAIN,
        )
    return None if needed is not None else _text(file, head, size)


def _other_archive(file: Path) -> ConfigError | None:
    """The refusal of a zip archive that torch.save did not write, or not to its end."""
    if not zipfile.is_zipfile(file):
        return ConfigError(
            f"checkpoint {file} is truncated: its {file.stat().st_size} bytes begin as a zip "
            "archive of torch.save, but the directory at its end is missing.",
            hint=AGAIN,
        )
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return None
    if any(name.endswith("/archive_format") for name in names):
        return ConfigError(
            f"checkpoint {file} is an archive of torch.export, which holds a program.",
            hint=SAVE_AGAIN,
        )
    shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    arrays = bool(names) and all(name.endswith(".npy") for name in names)
    return ConfigError(
        f"checkpoint {file} is {'an archive of NumPy arrays' if arrays else 'a zip archive'} "
        f"({shown}), not a file of torch.save.",
        hint=SAVE_AGAIN if arrays else "Unpack it, and give the file of the weights.",
    )


def _text(file: Path, head: bytes, size: int) -> ConfigError | None:
    """The refusal of a text: a pointer, a server's page, a config or a log beside the weights."""
    if not size:
        return ConfigError(f"checkpoint {file} is empty (0 bytes).", hint=AGAIN)
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
    text = head[:256].decode(errors="replace")
    if any(not char.isprintable() and not char.isspace() for char in text) or "\ufffd" in text[:-1]:
        return None
    return ConfigError(
        f"checkpoint {file} is a text file that begins with {' '.join(text.split())[:40]!r}.",
        hint="Give the file of the weights, such as a .safetensors or .pth file.",
    )


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
        name = named[1] if "." in named[1] else f"builtins.{named[1]}"
        problem = f"it holds {name}, and unpickling that can run code"
    elif "TorchScript" in str(error):
        problem = "it is a TorchScript archive, which holds a program"
    elif "Unsupported operand" in str(error) and zipfile.is_zipfile(file):
        problem = "it was saved with another pickle_protocol than torch's own, 2"
    elif "Only persistent_load of storage" in str(error):
        problem = "it holds a network that torch before 1.6 pickled whole, with its source code"
    else:
        problem = "it is damaged, or torch.save did not write it"
        again = "Download it again if it was downloaded. "
    return ConfigError(
        f"checkpoint {file} is not plain weights: {problem}.",
        hint=f"{again}In the program that wrote the checkpoint, save model.state_dict() alone, "
        "best with safetensors.torch.save_file.",
    )
