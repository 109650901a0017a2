"""`student.safetensors`: the trained student, as a teacher or another tool reads it."""

from __future__ import annotations

import json

from safetensors.torch import save

from cache_service.storage.local import LocalStorage
from distill.students import Student

STUDENT_NAME = "student.safetensors"


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
    storage.put(STUDENT_NAME, save(tensors, metadata=facts))
    storage.sweep()
