"""Which other view goes with each view: a pure function of (seeds, epoch, sample). No torch.

A batch follows the order of its seed; what goes with its views lies anywhere, and is found through
the inverse of an order. Shape letters: B views, N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cache_service.views.order import epoch_order, positions_of
from distill.batches import Cursor

CLASSMATE_KEY = int.from_bytes(b"kd-mates", "big")
"""Key of the streams that classmates are drawn from."""

SPECIAL_KEY = int.from_bytes(b"kd-speci", "big")
"""Key of the streams that the other half of a specialist's epoch is drawn from."""

Positions = NDArray[np.int64]


def positions_in(seed: int, samples_B: NDArray[np.integer], *, num_samples: int) -> Positions:
    """Where a seed visits these samples."""
    found_B: Positions = _inverse(num_samples, seed)[samples_B].astype(np.int64)
    return found_B


def other_seed(seeds: Sequence[int], epoch: int) -> int:
    """The seed whose views go with those of an epoch, of at least two seeds in use.

    The first time through the seeds it is the one half of them away, so that twice as many seeds
    as epochs give every view once; each further time it is another one.
    """
    turn, place = divmod(epoch, len(seeds))
    away = 1 + (len(seeds) // 2 - 1 + turn) % (len(seeds) - 1)
    return seeds[(place + away) % len(seeds)]


class Classmates:
    """Another sample of the same class for each one, drawn anew each epoch.

    The only sample of a class is its own classmate.
    """

    def __init__(self, labels_N: NDArray[np.integer]) -> None:
        by_class_N = np.argsort(labels_N, kind="stable")
        _, first_K, sizes_K = np.unique(labels_N[by_class_N], return_index=True, return_counts=True)
        self._by_class_N = by_class_N
        self._rank_N = np.empty_like(by_class_N)
        self._rank_N[by_class_N] = np.arange(len(labels_N)) - np.repeat(first_K, sizes_K)
        self._first_N, self._size_N = np.empty_like(by_class_N), np.empty_like(by_class_N)
        self._first_N[by_class_N] = np.repeat(first_K, sizes_K)
        self._size_N[by_class_N] = np.repeat(sizes_K, sizes_K)

    def of(self, samples_B: NDArray[np.integer], *, seed: int, epoch: int) -> NDArray[np.integer]:
        """The classmate of each of these samples."""
        words_B = _words(CLASSMATE_KEY, seed, epoch, len(self._rank_N))[samples_B]
        size_B = self._size_N[samples_B]
        steps_B = 1 + _below_each(words_B, np.maximum(size_B - 1, 1))
        rank_B = (self._rank_N[samples_B] + steps_B) % size_B
        mates_B: NDArray[np.integer] = self._by_class_N[self._first_N[samples_B] + rank_B]
        return mates_B


class Enriched:
    """Epochs that are half of samples of special classes, half of a draw of all others.

    Source: Hinton et al. 2015, section 5.2. Each epoch has every special sample once and as many
    of the others, or all of those where there are fewer, in the order of its seed.
    """

    def __init__(self, labels_N: NDArray[np.integer], special: Sequence[int]) -> None:
        self._is_special_N = np.isin(labels_N, special)
        num_special = int(self._is_special_N.sum())
        num_others = len(labels_N) - num_special
        self._num_drawn = min(num_special, num_others)
        self.num_samples = num_special + self._num_drawn
        self.oversampling = num_others / self._num_drawn if self._num_drawn else 1.0
        self._known: tuple[tuple[int, int], Positions] | None = None

    def at(self, cursor: Cursor) -> Positions:
        """The recorded positions that a cursor over such an epoch means."""
        wanted = cursor.seed, cursor.epoch
        if self._known is None or self._known[0] != wanted:
            self._known = wanted, self._draw(*wanted)
        return self._known[1][cursor.start : cursor.stop]

    def _draw(self, seed: int, epoch: int) -> Positions:
        words_N = _words(SPECIAL_KEY, seed, epoch, len(self._is_special_N))
        others = np.flatnonzero(~self._is_special_N)
        drawn = others[np.argsort(words_N[others], kind="stable")[: self._num_drawn]]
        chosen_N = self._is_special_N.copy()
        chosen_N[drawn] = True
        order_N = epoch_order(len(chosen_N), seed)
        return np.flatnonzero(chosen_N[order_N])


def plain_positions(cursor: Cursor) -> Positions:
    """The recorded positions that a cursor means where an epoch is a whole seed."""
    return np.arange(cursor.start, cursor.stop, dtype=np.int64)


@lru_cache(maxsize=4)
def _inverse(num_samples: int, seed: int) -> NDArray[np.int32]:
    return positions_of(epoch_order(num_samples, seed))


@lru_cache(maxsize=2)
def _words(key: int, seed: int, epoch: int, count: int) -> NDArray[np.uint64]:
    """One Philox word for each sample, of a stream that no other draw reads."""
    counter = np.array([0, 0, epoch, 0], dtype=np.uint64)
    bits = np.random.Philox(key=np.array([key, seed], dtype=np.uint64), counter=counter)
    return bits.random_raw(count)


def _below_each(words_B: NDArray[np.uint64], counts_B: NDArray[np.integer]) -> Positions:
    """Uniform integers from 0 up to each count, exclusive: 32 bits of each word, scaled."""
    half = np.uint64(32)
    return ((words_B >> half) * counts_B.astype(np.uint64) >> half).astype(np.int64)
