"""Whether a teacher knows the labels better under another usual normalization of its input.

A wrong mean and deviation cost a few percent of accuracy, which no bar on the accuracy notices: an
ImageNet network that learned from -1 to 1 is right on 53 of 64 images under ImageNet's statistics
instead of 59. So the label's likelihood is compared, view by view, after each set of logits was
given its best temperature: a network that is merely more confident is no better. Both the
likelihood and the accuracy must speak for another normalization before it is reported.

Shape letters: N views, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache_service.teacher.teacher import Teacher

Floats = NDArray[np.float64]

NUM_COMPARED = 64
"""Views that are answered under every normalization."""

MIN_VIEWS = 16
"""Fewest views from which anything is concluded."""

MIN_DEVIATIONS = 3.0
"""Standard deviations of a sign test by which labels must be more likely."""

MIN_RIGHT_DEVIATIONS = 2.0
"""The same for views that are classified correctly under one of the two only."""

MAX_LOSS = 0.9
"""Most negative log-likelihood that it may have, as a part of that of the present one."""

MIN_GAIN = 0.02
"""Change of a negative log-likelihood, nats, that counts. Where a teacher is nearly certain of all
labels, smaller ones have the same sign for all views and say nothing."""

MAX_CHANGE = 1e-3
"""Largest difference of two normalizations that are the same."""

TEMPERATURES = np.geomspace(0.1, 10, 41)

USUAL: dict[int, dict[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    3: {
        "ImageNet's statistics": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "-1 to 1": ((0.5,) * 3, (0.5,) * 3),
        "0 to 1": ((0.0,) * 3, (1.0,) * 3),
        "0 to 255": ((0.0,) * 3, (1 / 255,) * 3),
        "CIFAR-10's statistics": ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
        "CIFAR-100's statistics": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        "CLIP's statistics": ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
    },
    1: {
        "MNIST's statistics": ((0.1307,), (0.3081,)),
        "-1 to 1": ((0.5,), (0.5,)),
        "0 to 1": ((0.0,), (1.0,)),
        "0 to 255": ((0.0,), (1 / 255,)),
        "ImageNet's statistics": ((0.449,), (0.226,)),
    },
}
"""Mean and standard deviation on the scale from 0 to 1, by channels and name."""


class OtherNormalization(NamedTuple):
    """A normalization under which the teacher knows the labels better.

    Attributes:
        name: of `USUAL`.
        mean, std: per channel.
        right, right_now: views that are classified correctly, under this one and the present one.
        preferred: fraction of views whose label is more likely under this one.
        num_views: N.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    right: int
    right_now: int
    preferred: float
    num_views: int

    @property
    def description(self) -> str:
        """To follow "is right on N of M views"."""
        return (
            f"and on {self.right} if its input is normalized by {self.name}; the label is then "
            f"more likely for {self.preferred:.0%} of them"
        )

    @property
    def hint(self) -> str:
        """The settings."""
        mean, std = ([round(value, 6) for value in values] for values in (self.mean, self.std))
        return f"teacher.mean: {mean} and teacher.std: {std}"


def find_other_normalization(
    teacher: Teacher, views: Sequence[Tensor], labels_N: NDArray[np.int64]
) -> OtherNormalization | None:
    """The usual normalization that is clearly better than the teacher's; None if there is none.

    Args:
        teacher: it answers the first `NUM_COMPARED` views once more for every normalization.
        views: batches of uint8 views [B, H, W, 3].
        labels_N: of all batches in their order.
    """
    labels_N = labels_N[:NUM_COMPARED]
    if teacher.id.classes is not None:
        labels_N = np.array(teacher.id.classes, np.int64)[labels_N]
    if len(labels_N) < MIN_VIEWS:
        return None
    present = teacher.id.preprocess
    now_NC = _whole_images(teacher, views, len(labels_N))
    if not np.isfinite(now_NC).all():
        return None
    loss_N, right_now_N = _losses(now_NC, labels_N), now_NC.argmax(axis=1) == labels_N
    found: list[OtherNormalization] = []
    for name, (mean, std) in USUAL[present.channels].items():
        if np.allclose((mean, std), (present.mean, present.std), rtol=0, atol=MAX_CHANGE):
            continue
        changed = present.model_copy(update={"mean": mean, "std": std})
        other = replace(teacher, id=teacher.id.model_copy(update={"preprocess": changed}))
        then_NC = _whole_images(other, views, len(labels_N))
        if not np.isfinite(then_NC).all():
            continue
        then_N, right_N = _losses(then_NC, labels_N), then_NC.argmax(axis=1) == labels_N
        is_clear = (
            _deviations(right_N.astype(np.float64) - right_now_N) >= MIN_RIGHT_DEVIATIONS
            and _deviations(loss_N - then_N) >= MIN_DEVIATIONS
            and then_N.mean() <= MAX_LOSS * loss_N.mean()
        )
        if is_clear:
            counts = int(right_N.sum()), int(right_now_N.sum())
            preferred = float((then_N < loss_N).mean())
            found.append(OtherNormalization(name, mean, std, *counts, preferred, len(labels_N)))
    return max(found, key=lambda one: (one.right, one.preferred), default=None)


def _deviations(gain_N: Floats) -> float:
    """Of a sign test over the views that change by enough to mean anything."""
    changed = gain_N[np.abs(gain_N) >= MIN_GAIN]
    return float(np.sign(changed).sum() / max(len(changed), 1) ** 0.5)


def _whole_images(teacher: Teacher, views: Sequence[Tensor], count: int) -> Floats:
    """Logits [N, C] of the first views, of the whole image, for all outputs of the network."""
    answers: list[Floats] = []
    for batch in views:
        left = count - sum(map(len, answers))
        if left <= 0:
            break
        answers.append(teacher.answer_whole(batch[:left]).astype(np.float64))
    return np.concatenate(answers)


def _losses(logits_NC: Floats, labels_N: NDArray[np.int64]) -> Floats:
    """Negative log-likelihoods of the labels, at the temperature with the smallest mean."""
    every = [_log_losses(logits_NC / temperature, labels_N) for temperature in TEMPERATURES]
    return min(every, key=lambda losses_N: float(losses_N.mean()))


def _log_losses(logits_NC: Floats, labels_N: NDArray[np.int64]) -> Floats:
    shifted_NC = logits_NC - logits_NC.max(axis=1, keepdims=True)
    own_N = shifted_NC[np.arange(len(labels_N)), labels_N]
    losses_N: Floats = np.log(np.exp(shifted_NC).sum(axis=1)) - own_N
    return losses_N
