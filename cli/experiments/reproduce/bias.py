"""The bias of one class, raised to where the fewest samples are classified wrong.

Shape letters: N samples, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Labels = NDArray[np.int64]


class Errors(NamedTuple):
    """Wrong answers.

    Attributes:
        total: over all samples.
        of_class: over the samples of the class in question.
    """

    total: int
    of_class: int


def count_errors(logits_NC: Logits, labels_N: Labels, *, label: int, raised: float = 0.0) -> Errors:
    """Wrong answers once `raised` is added to the logit of class `label`."""
    shifted_NC = logits_NC.astype(np.float64)
    shifted_NC[:, label] += raised
    wrong_N = shifted_NC.argmax(axis=1) != labels_N
    return Errors(int(wrong_N.sum()), int(wrong_N[labels_N == label].sum()))


def choose_raise(logits_NC: Logits, labels_N: Labels, *, label: int) -> float:
    """What to add to the bias of class `label` for the fewest errors; the least where several do.

    Exact, not a grid: the number of errors changes only where a sample's logit of the class
    overtakes the largest of the others, so the middle between each two such places is tried.
    """
    others_NC = logits_NC.astype(np.float64)
    own_N = others_NC[:, label].copy()
    others_NC[:, label] = -np.inf
    margins_N = others_NC.max(axis=1) - own_N
    is_class_N = labels_N == label
    right_else_N = others_NC.argmax(axis=1) == labels_N
    order_N = np.argsort(margins_N, kind="stable")
    ordered_N = margins_N[order_N]
    # errors[k]: the first k samples, by margin, are taken for the class and the rest are not
    change_N = np.where(is_class_N, -1, right_else_N.astype(np.int64))[order_N]
    errors = int((~right_else_N).sum()) + np.concatenate([[0], np.cumsum(change_N)])
    first = int((ordered_N < 0).sum())
    distinct = np.concatenate([[True], ordered_N[1:] > ordered_N[:-1], [True]])
    candidates = [k for k in range(first + 1, len(errors)) if distinct[k]]
    best = min(candidates, key=lambda k: (errors[k], k), default=first)
    if best == first or count_errors(logits_NC, labels_N, label=label).total <= errors[best]:
        return 0.0
    if best == len(ordered_N):
        return float(ordered_N[-1]) + 1.0
    return float(ordered_N[best - 1] + ordered_N[best]) / 2
