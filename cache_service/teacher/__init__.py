"""Teachers by name: frozen networks, their identity, and the check that they know the dataset.

What loads networks is imported on first use: the service checks a `teacher:` section without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from cache_service.teacher.config import TeacherConfig

if TYPE_CHECKING:
    from cache_service.teacher.load import load_teacher
    from cache_service.teacher.score import (
        Score,
        require_trained,
        samples_to_score,
        score_teacher,
    )
    from cache_service.teacher.teacher import Teacher

__all__ = [
    "Score",
    "Teacher",
    "TeacherConfig",
    "load_teacher",
    "require_trained",
    "samples_to_score",
    "score_teacher",
]

_HOMES = {
    "Score": "score",
    "Teacher": "teacher",
    "load_teacher": "load",
    "require_trained": "score",
    "samples_to_score": "score",
    "score_teacher": "score",
}

if not TYPE_CHECKING:  # a type checker must go on refusing names that do not exist

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
