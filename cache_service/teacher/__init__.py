"""Teachers by name: frozen networks, their identity, and the check that they know the dataset."""

from __future__ import annotations

from cache_service.teacher.config import TeacherConfig
from cache_service.teacher.load import load_teacher
from cache_service.teacher.score import Score, require_trained, score_teacher
from cache_service.teacher.teacher import Teacher

__all__ = [
    "Score",
    "Teacher",
    "TeacherConfig",
    "load_teacher",
    "require_trained",
    "score_teacher",
]
