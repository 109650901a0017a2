"""Checks that the teacher knows the dataset before anything is recorded.

A wrong normalization, wrong weights or another class order would otherwise be recorded silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache_service.errors import UntrainedTeacherError
from cache_service.format.cells import expand_cells
from cache_service.models.preprocess import recorded_preprocess
from cache_service.teacher.class_order import OtherOrder, find_other_order
from cache_service.teacher.normalization import OtherNormalization, find_other_normalization
from cache_service.teacher.settings import TeacherConfig
from cache_service.teacher.teacher import Teacher

MIN_PER_CLASS = 4
"""Samples of a class, on average, from which an order of the classes can be measured."""


@dataclass(frozen=True)
class Score:
    """Top-1 accuracy on labeled views, what guessing gives, and what would be better.

    Attributes:
        other_order: of the classes, under which the teacher is right far more often.
        other_normalization: of its input, under which it knows the labels better.
    """

    accuracy: float
    num_samples: int
    chance: float
    other_order: OtherOrder | None = None
    other_normalization: OtherNormalization | None = None

    @property
    def needed(self) -> float:
        """Twice chance; halfway to perfect where that is less, which it is for two classes."""
        return min(2 * self.chance, (1 + self.chance) / 2)


def score_teacher(
    teacher: Teacher,
    views: Sequence[Tensor],
    labels: NDArray[np.int64],
    *,
    names: Sequence[str] = (),
    num_classes: int | None = None,
) -> Score:
    """Top-1 accuracy of the whole-image cell.

    Args:
        teacher: the network to score.
        views: batches of uint8 views [B, H, W, 3].
        labels: [N], of all batches in their order.
        names: class names of the dataset by label; empty if it has none.
        num_classes: of the dataset, where the teacher has more; chance is one in this many.
    """
    batches = [predict_classes(teacher, batch) for batch in views]
    predictions_N = np.concatenate(batches) if batches else np.zeros(0, np.int64)
    if len(predictions_N) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions_N)} views and {len(labels)} labels to score")
    num_classes = num_classes or teacher.id.num_classes
    return Score(
        accuracy=float((predictions_N == labels).mean()),
        num_samples=len(labels),
        chance=1 / num_classes,
        other_order=find_other_order(
            predictions_N,
            labels,
            names=names,
            num_classes=max(num_classes, int(labels.max()) + 1),
        ),
        other_normalization=find_other_normalization(teacher, views, labels),
    )


def samples_to_score(labels_N: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Which of N samples in random order to score: the first, or pairs of one class.

    Among many classes the first few hundred samples are of a class each, and one sample cannot say
    whether its class is always answered by the same wrong output. So half of them are then chosen
    to share their class with one of the other half.
    """
    if len(labels_N) <= count or labels_N.max() < count // MIN_PER_CLASS:
        return np.arange(min(count, len(labels_N)), dtype=np.int64)
    first_N, rest_N = labels_N[: count // 2], labels_N[count // 2 :]
    classes, nearest = np.unique(rest_N, return_index=True)
    mates = nearest[np.isin(classes, first_N)] + len(first_N)
    return np.concatenate([np.arange(len(first_N)), mates]).astype(np.int64)


def require_trained(score: Score, config: TeacherConfig) -> None:
    """Refuse a teacher that scores like a guess, or whose classes or input are not as assumed.

    Raises:
        UntrainedTeacherError: below twice chance, or right far more often under another order of
            the classes, or better under another normalization where nothing states the present
            one; and `allow_untrained` is off.
    """
    other = score.other_order
    if config.allow_untrained:
        return
    if score.other_normalization is not None and other is None and not states_input(config):
        raise _assumed_normalization(score.other_normalization, config)
    if score.accuracy >= score.needed and other is None:
        return
    counts = f"teacher {config.model} is right on {score.accuracy:.1%} of {score.num_samples} views"
    regardless = "To record it all the same, set teacher.allow_untrained: true."
    if other is not None:
        raise UntrainedTeacherError(
            f"{counts}, and on {other.accuracy:.1%} under another class order: the teacher's "
            f"classes look like {other.description}.",
            hint=f"{other.hint} {regardless}",
        )
    raise UntrainedTeacherError(
        f"{counts}, where guessing gives {score.chance:.1%} and {score.needed:.1%} is required. "
        "Likely causes: normalization (teacher.mean, teacher.std, teacher.input_size), another "
        f"class order in the dataset, or the wrong weights (teacher.checkpoint: "
        f"{config.checkpoint}).",
        hint=regardless,
    )


def states_input(config: TeacherConfig) -> bool:
    """Whether the build file, the published weights or the checkpoint say how input is prepared."""
    if config.mean is not None or config.pretrained:
        return True
    return config.checkpoint is not None and recorded_preprocess(config.checkpoint) is not None


def _assumed_normalization(
    other: OtherNormalization, config: TeacherConfig
) -> UntrainedTeacherError:
    return UntrainedTeacherError(
        f"teacher {config.model} is right on {other.right_now} of {other.num_views} views, "
        f"{other.description}. Nothing states how its input was normalized in its training.",
        hint=f"Set {other.hint}, or set the present ones to keep them.",
    )


def predict_classes(teacher: Teacher, views_BHW3: Tensor) -> NDArray[np.int64]:
    """The class of each view [B, H, W, 3] by its whole-image cell."""
    stored_BRC = teacher.answer(views_BHW3)
    if teacher.stored_scales[0] != 1:
        stored_BRC = expand_cells(stored_BRC, (1,), teacher.stored_scales)
    predictions_B: NDArray[np.int64] = stored_BRC[:, 0].argmax(axis=-1)
    return predictions_B
