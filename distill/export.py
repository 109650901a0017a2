"""`student.safetensors`: the trained student, as a teacher or another tool reads it."""

from __future__ import annotations

import json
import struct

from safetensors.torch import save

from cache_service.storage.local import LocalStorage
from distill.students import Student

STUDENT_NAME = "student.safetensors"

_LENGTH = struct.Struct("<Q")
"""Of the header, in front of it."""


def export_student(out: str, student: Student, *, name: str, num_classes: int) -> None:
    """Write the weights into the folder `out`, with what one must know to use them.

    Raises:
        OutOfSpaceError, StorageError: the file is not there, or still the one before.
    """
    # Copies, because safetensors refuses tensors that share memory or are laid out channels-last.
    tensors = {
        key: value.detach().cpu().contiguous().clone()
        for key, value in student.model.state_dict().items()
    }
    facts = {
        "model": name,
        "num_classes": str(num_classes),
        "preprocess": json.dumps(student.preprocess.model_dump(mode="json")),
    }
    storage = LocalStorage(out)
    storage.put(STUDENT_NAME, _ordered(save(tensors, metadata=facts)))
    storage.sweep()


def _ordered(content: bytes) -> bytes:
    """The same document with its metadata by name: the library writes them in a random order.

    Equal students are thus equal files, which a checksum of the file can tell.
    """
    (size,) = _LENGTH.unpack_from(content)
    start = _LENGTH.size + size
    header = json.loads(content[_LENGTH.size : start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces, as the library pads: values behind the header stay where they are aligned.
    padded = text.ljust(-(-len(text) // _LENGTH.size) * _LENGTH.size)
    return _LENGTH.pack(len(padded)) + padded + content[start:]
