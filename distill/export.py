"""Writes the trained student to `student.safetensors` for other tools, and reads it back."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save

from cache_service.config import read_document
from cache_service.errors import ConfigError, CorruptError
from cache_service.human_format import one_line
from cache_service.models.checkpoint_file import UNREADABLE
from cache_service.storage.local import LocalStorage
from distill.checkpoint import EXPECTED_FILES, Payload
from distill.students import Student

STUDENT_NAME = "student.safetensors"

CONFIG_NAME = "config.yaml"
"""Name of the complete train file, in the same folder as the student."""

_LENGTH = struct.Struct("<Q")
"""Length of the header in bytes, which the file starts with."""


def export_student(
    out: str,
    student: Student,
    *,
    name: str,
    num_classes: int,
    view_size: int,
    classes: Sequence[str] = (),
) -> None:
    """Write weights, preprocessing and class names to `student.safetensors` in the folder `out`.

    Args:
        out: output folder.
        student: network and preprocessing.
        name: name of the network, as in a train file.
        num_classes: number of logits.
        view_size: side of the training views, px.
        classes: names of the classes; empty if the dataset has none.

    Raises:
        OutOfSpaceError, StorageError: the file cannot be written. An older file is unchanged.
    """
    # Copies, because safetensors refuses tensors that share memory or are laid out channels-last.
    tensors = {
        key: value.detach().cpu().contiguous().clone()
        for key, value in student.model.state_dict().items()
    }
    facts = {
        "model": name,
        "num_classes": str(num_classes),
        "view_size": str(view_size),
        "classes": json.dumps(list(classes)),
        "preprocess": json.dumps(student.preprocess.model_dump(mode="json")),
    }
    storage = LocalStorage(out)
    storage.put(STUDENT_NAME, _ordered(save(tensors, metadata=facts)))
    storage.sweep()


def load_exported(path: str | Path) -> Payload:
    """Load an exported student in the format of a checkpoint.

    The settings of its run, including the evaluation set, are read from `config.yaml` in the same
    folder.

    Raises:
        ConfigError: there is no such file, it was not written by `kd-cache train`, or its
            `config.yaml` is missing.
        CorruptError: the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} is not a file.", hint=EXPECTED_FILES)
    try:
        with safe_open(path, framework="pt") as opened:
            facts = opened.metadata() or {}
        if not {"num_classes", "preprocess"} <= facts.keys():
            raise ConfigError(
                f"{path} was not written by `kd-cache train`: it does not describe a student.",
                hint=EXPECTED_FILES,
            )
        preprocess = json.loads(facts["preprocess"])
        payload = {
            "model": load_file(path),
            "ema": None,
            "num_classes": int(facts["num_classes"]),
            "classes": json.loads(facts.get("classes", "[]")),
            # Earlier versions did not write it. It usually equals the input size of the student.
            "view_size": int(facts.get("view_size", preprocess["size"])),
            "preprocess": preprocess,
        }
    except UNREADABLE as problem:
        raise CorruptError(f"{path} cannot be read: {one_line(problem)}") from problem
    config = path.with_name(CONFIG_NAME)
    if not config.is_file():
        raise ConfigError(
            f"{path} holds weights alone, and {config}, which describes their run, is missing.",
            hint=f"Put the run's {CONFIG_NAME} beside it, or name the run's checkpoint.pt.",
        )
    return {"config": read_document(config), **payload}


def _ordered(content: bytes) -> bytes:
    """Sort the metadata, which the library writes in random order.

    Equal students then give equal files with equal checksums.
    """
    (size,) = _LENGTH.unpack_from(content)
    start = _LENGTH.size + size
    header = json.loads(content[_LENGTH.size : start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Pad with spaces, as the library does, so that the tensors stay aligned to 8 bytes.
    padded = text.ljust(-(-len(text) // _LENGTH.size) * _LENGTH.size)
    return _LENGTH.pack(len(padded)) + padded + content[start:]
