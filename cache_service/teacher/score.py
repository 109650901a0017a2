"""Does the teacher know the dataset? A wrong normalization or class order trains without a word."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache_service.errors import UntrainedTeacherError
from cache_service.format.cells import expand_cells
from cache_service.teacher.config import TeacherConfig
from cache_service.teacher.teacher import Teacher


@dataclass(frozen=True)
class Score:
    """Top-1 accuracy on labeled views, and what guessing gives."""

    accuracy: float
    num_samples: int
    chance: float

    @property
    def needed(self) -> float:
        """Twice chance; halfway to perfect where that is less, which it is for two classes."""
        return min(2 * self.chance, (1 + self.chance) / 2)


def score_teacher(
    teacher: Teacher,
    views: Iterable[Tensor],
    labels: NDArray[np.int64],
    *,
    num_classes: int | None = None,
) -> Score:
    """Top-1 accuracy of the whole-image cell.

    Args:
        views: batches of uint8 views [B, H, W, 3].
        labels: [N], of all batches in their order.
        num_classes: of the dataset, where the teacher has more; chance is one in this many.
    """
    verdicts = [_verdicts(teacher, batch) for batch in views]
    chosen = np.concatenate(verdicts) if verdicts else np.zeros(0, np.int64)
    if len(chosen) != len(labels) or not len(labels):
        raise ValueError(f"{len(chosen)} views and {len(labels)} labels to score")
    return Score(
        accuracy=float((chosen == labels).mean()),
        num_samples=len(labels),
        chance=1 / (num_classes or teacher.id.num_classes),
    )


def require_trained(score: Score, config: TeacherConfig) -> None:
    """Refuse a teacher that scores like a guess.

    Raises:
        UntrainedTeacherError: below twice chance, and `allow_untrained` is off.
    """
    if config.allow_untrained or score.accuracy >= score.needed:
        return
    raise UntrainedTeacherError(
        f"teacher {config.model} is right on {score.accuracy:.1%} of {score.num_samples} views, "
        f"where guessing gives {score.chance:.1%} and {score.needed:.1%} is asked for. Likely "
        "causes: normalization (teacher.mean, teacher.std, teacher.input_size), another class "
        f"order in the dataset, or the wrong weights (teacher.checkpoint: {config.checkpoint}).",
        hint="To record it all the same, set teacher.allow_untrained: true.",
    )


def _verdicts(teacher: Teacher, views_BHW3: Tensor) -> NDArray[np.int64]:
    stored_BRC = teacher.answer(views_BHW3)
    if teacher.stored_scales[0] != 1:
        stored_BRC = expand_cells(stored_BRC, (1,), teacher.stored_scales)
    verdicts_B: NDArray[np.int64] = stored_BRC[:, 0].argmax(axis=-1)
    return verdicts_B
