"""Which classes `topk` keeps of each row of logits, and the moments of the others.

The stored bytes are defined by `rank_rows`, which sorts every class. `summarize_rows` returns the
same bytes from a partition and three sums. Its float64 sums differ from those of the definition in
their last bits, so each comes with a bound on both errors: where the interval does not round to one
float32, that row is computed by the definition.

Shape letters: N rows, C classes, K kept classes, L labels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

BLOCK_LOGITS = 2**17
"""Logits that are worked on at a time: their float64 are 1 MB, the second cache of a CPU core."""

MIN_BLOCK_ROWS = 8

MIN_EXPONENT = -600.0
"""Exponentials of float64 keep their precision above."""


class TopRows(NamedTuple):
    """What is kept of rows of logits.

    Attributes:
        kept_NK: the labels and the largest logits, ties by class, as class numbers ascending.
        values_NK: their logits.
        mean_N, var_N, max_N, lme_N: float32 mean, variance, largest and log mean exp of the rest.
    """

    kept_NK: NDArray[np.int64]
    values_NK: Floats
    mean_N: Floats
    var_N: Floats
    max_N: Floats
    lme_N: Floats


def summarize_rows(logits_NC: Floats, labels_NL: NDArray[np.int64], k: int) -> TopRows:
    """The kept classes and the moments of the others; byte for byte those of `rank_rows`."""
    num_rows, num_classes = logits_NC.shape
    block = max(MIN_BLOCK_ROWS, BLOCK_LOGITS // num_classes)
    starts = range(0, max(num_rows, 1), block)  # one at least, so that no rows give empty arrays
    parts = [
        _summarize_block(logits_NC[at : at + block], labels_NL[at : at + block], k) for at in starts
    ]
    return TopRows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def rank_rows(logits_NC: Floats, labels_NL: NDArray[np.int64], k: int) -> TopRows:
    """The definition of the stored bytes: sorts all classes, and sums in descending order."""
    ranked_NC = logits_NC.astype(np.float64)
    # Labels are lifted above everything, so they are kept whatever their logit.
    np.put_along_axis(ranked_NC, labels_NL, np.inf, axis=-1)
    order_NC = np.argsort(-ranked_NC, axis=-1, kind="stable")
    tail_NX = np.take_along_axis(logits_NC, order_NC[:, k:], axis=-1).astype(np.float64)
    # Sorted by class, so that the bytes do not depend on ties, and readers may search them.
    kept_NK = np.sort(order_NC[:, :k], axis=-1)
    return TopRows(
        kept_NK,
        np.take_along_axis(logits_NC, kept_NK, axis=-1),
        tail_NX.mean(axis=-1).astype(np.float32),
        tail_NX.var(axis=-1).astype(np.float32),
        tail_NX.max(axis=-1).astype(np.float32),
        _log_mean_exp(tail_NX).astype(np.float32),
    )


def _summarize_block(logits_NC: Floats, labels_NL: NDArray[np.int64], k: int) -> TopRows:
    num_rows, num_classes = logits_NC.shape
    num_tail = num_classes - k
    # Flat places: numpy indexes one axis several times faster than two.
    row_starts_N1 = np.arange(0, num_rows * num_classes, num_classes)[:, None]
    labels = (row_starts_N1 + labels_NL).ravel()
    parted_NC = logits_NC.copy()
    parted_NC.reshape(-1)[labels] = np.inf
    parted_NC.partition(num_tail, axis=-1)
    max_N = parted_NC[:, :num_tail].max(axis=-1)
    places = _kept_places(logits_NC, labels, parted_NC[:, num_tail, None], k)

    tail_NC = logits_NC.astype(np.float64)
    tail_NC.reshape(-1)[places] = np.repeat(max_N, k)
    low_3N, high_3N = _bound_moments(tail_NC, max_N.astype(np.float64), k)
    mean_N, var_N, lme_N = low_3N
    kept_NK = places.reshape(num_rows, k) - row_starts_N1
    values_NK = logits_NC.reshape(-1)[places].reshape(num_rows, k)
    rows = TopRows(kept_NK, values_NK, mean_N, var_N, max_N, lme_N)
    certain_N = (low_3N.view(np.int32) == high_3N.view(np.int32)).all(axis=0)
    # The largest of 0.0 and -0.0 may be either.
    unsure = np.flatnonzero(~(certain_N & (max_N != 0)))
    if unsure.size:
        arrays: list[NDArray[Any]] = [*rows]
        exact = rank_rows(logits_NC[unsure], labels_NL[unsure], k)
        for array, values in zip(arrays, exact, strict=True):
            array[unsure] = values
    return rows


def _kept_places(
    logits_NC: Floats, labels: NDArray[np.int64], least_N1: Floats, k: int
) -> NDArray[np.int64]:
    """Flat places of the kept classes, k a row, ascending.

    Args:
        logits_NC: all logits.
        labels: flat places of the labels, which count as larger than every logit.
        least_N1: the k-th largest of each row; infinite where there are k labels.
        k: classes to keep.
    """
    kept_NC: NDArray[np.bool_] = logits_NC >= least_N1
    kept_NC.reshape(-1)[labels] = True
    places = np.flatnonzero(kept_NC)
    if places.size > k * len(logits_NC):  # several classes tie for the last places of a row
        above_NC: NDArray[np.bool_] = logits_NC > least_N1
        above_NC.reshape(-1)[labels] = True
        tied = np.flatnonzero(np.count_nonzero(kept_NC, axis=-1) > k)
        above, equal = above_NC[tied], kept_NC[tied] & ~above_NC[tied]
        free = k - np.count_nonzero(above, axis=-1, keepdims=True)
        kept_NC[tied] = above | (equal & (np.cumsum(equal, axis=-1) <= free))
        places = np.flatnonzero(kept_NC)
    return places


def _bound_moments(tail_NC: Doubles, max_N: Doubles, k: int) -> tuple[Floats, Floats]:
    """Least and largest mean, variance and log mean exp that the definition can give, [3, N].

    Where they cannot be bounded, because exponentials leave the range of float64, they differ.

    Args:
        tail_NC: logits; those of the k kept classes replaced by the largest of the others.
        max_N: the largest of the others.
        k: number of kept classes.

    A sum of n float64 in any order is off by n u times the sum of magnitudes at most, where u is
    half of `eps`. `gamma` is more than twice that for the n terms, and covers the rounding of each
    and 16 units of `exp` as well.
    """
    num_classes = tail_NC.shape[1]
    num_tail, eps = num_classes - k, float(np.finfo(np.float64).eps)
    gamma = (num_classes + 16) * eps
    ones = np.ones(num_classes)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        sum_N, square_N = tail_NC @ ones, np.vecdot(tail_NC, tail_NC)
        np.exp(tail_NC, out=tail_NC)
        sum_exp_N, exp_max_N = tail_NC @ ones, np.exp(max_N)
        mean_N = (sum_N - k * max_N) / num_tail
        var_N = (square_N - k * max_N**2) / num_tail - mean_N**2
        mean_exp_N = (sum_exp_N - k * exp_max_N) / num_tail
        log_N = np.log(mean_exp_N)
        # By Cauchy-Schwarz, the mean magnitude is at most the root of the mean square.
        mean_square_N = square_N / num_tail
        mean_off_N = 1.5 * gamma * np.sqrt(mean_square_N * (num_classes / num_tail))
        var_off_N = 2 * (np.sqrt(mean_square_N) + mean_off_N) * mean_off_N
        log_off_N = 4 * gamma * sum_exp_N / (num_tail * mean_exp_N)
        log_off_N += 16 * eps * (np.abs(max_N) + np.abs(log_N))
        moments_3N = np.stack([mean_N, var_N, log_N])
        off_3N = np.stack([mean_off_N, var_off_N, log_off_N])
        low_3N, high_3N = moments_3N - off_3N, moments_3N + off_3N
        unbounded_3N = ~(np.isfinite(low_3N) & np.isfinite(high_3N) & (max_N > MIN_EXPONENT))
        low_3N[unbounded_3N], high_3N[unbounded_3N] = -1.0, 1.0
        return low_3N.astype(np.float32), high_3N.astype(np.float32)


def _log_mean_exp(tail_NX: NDArray[Any]) -> Doubles:
    largest_N: Doubles = tail_NX.max(axis=-1)
    mean_N: Doubles = np.exp(tail_NX - largest_N[:, None]).mean(axis=-1)
    return largest_N + np.log(mean_N)
