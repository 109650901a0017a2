"""What a method requires beyond one view of each sample, and how the stream provides it.

A method declares `Requirements`. Those of all students on one stream are combined into one object,
and `ViewSelection` applies it: which recorded positions an epoch consists of, and which other views
are read with each batch. All of it is a pure function of (seeds, epoch, sample), so a resumed run
goes on with the same views, whatever the number of loader workers. To compare views in a new way,
write a subclass of `Pairing` and name it in the method's requirements.

Shape letters: B views, N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import ConfigError, UnsupportedError
from cache_service.format.seeds import describe_seeds
from cache_service.views.order import epoch_order, pass_order, positions_of, visits

Samples = NDArray[np.integer]
Positions = NDArray[np.int64]

SAME_CLASS_KEY = int.from_bytes(b"kd-mates", "big")
"""Philox key of the draws of same-class pairs. Changing it changes recorded training curves."""

SPECIAL_KEY = int.from_bytes(b"kd-speci", "big")
"""Philox key of the draws that fill the other half of a specialist's epoch."""


class Pairing:
    """Chooses another view for each view of a batch. Pickled into loader workers.

    Attributes:
        name: key of these views in `Batch.other_views`.
        seeds_per_epoch: how many different seeds one epoch reads, the epoch's own included.

    Args:
        labels_N: of the dataset.
        seeds: of the run, in the order of their use.
    """

    name: ClassVar[str]
    seeds_per_epoch: ClassVar[int] = 1

    def __init__(self, labels_N: Samples, seeds: Sequence[int]) -> None:
        self.labels_N, self.seeds = labels_N, seeds

    def choose(self, samples_B: Samples, *, seed: int, epoch: int) -> tuple[int, Samples]:
        """The seed of the other views of a batch in an epoch of `seed`, and the sample of each."""
        raise NotImplementedError


class Requirements(NamedTuple):
    """What a method requires beyond one view of each sample, in the order of the seed.

    Attributes:
        other_views: pairings; each provides one other view for every view of a batch.
        prediction_history: what the student itself predicted for each sample an epoch before.
        peers: the logits of the other students of the run that also require peers.
        special_classes: epochs with every sample of these classes and as many of all others.
    """

    other_views: tuple[type[Pairing], ...] = ()
    prediction_history: bool = False
    peers: bool = False
    special_classes: tuple[int, ...] | None = None

    @property
    def seeds_per_epoch(self) -> int:
        """How many different seeds one epoch reads."""
        return max((pairing.seeds_per_epoch for pairing in self.other_views), default=1)


def combine_requirements(by_method: Sequence[tuple[str, Requirements]]) -> Requirements:
    """The requirements of several methods, given with their names, on one stream.

    Raises:
        ConfigError: they require epochs of different samples.
    """
    special_classes = {required.special_classes for _, required in by_method}
    if len(special_classes) > 1:
        epochs = "; ".join(
            f"{name} {list(required.special_classes or ()) or 'all samples'}"
            for name, required in by_method
        )
        raise ConfigError(
            f"the students share one stream, but need epochs of different classes: {epochs}.",
            hint="Train each specialist by a train file of its own.",
        )
    pairings = [pairing for _, required in by_method for pairing in required.other_views]
    return Requirements(
        other_views=tuple(dict.fromkeys(pairings)),
        prediction_history=any(required.prediction_history for _, required in by_method),
        peers=any(required.peers for _, required in by_method),
        special_classes=special_classes.pop() if special_classes else None,
    )


class ViewSelection:
    """The views that each step of a run reads. Pickled into loader workers.

    Args:
        requirements: of all methods on the stream.
        labels_N: of the dataset.
        seeds: of the run, in the order of their use.
        repeats: of the recipe. Other views of a sample are then those in the same seed.

    Attributes:
        num_samples: positions in one epoch.
        identity: what identifies the selection in a checkpoint, as JSON.

    Raises:
        ConfigError: the seeds are too few, or no sample has one of the special classes.
        UnsupportedError: the methods require every sample in every seed, but there are repeats.
    """

    def __init__(
        self,
        requirements: Requirements,
        *,
        labels_N: Samples,
        seeds: Sequence[int],
        repeats: int = 1,
    ) -> None:
        if repeats > 1:
            _refuse_with_repeats(requirements, repeats)
        elif requirements.seeds_per_epoch > len(set(seeds)):
            raise ConfigError(
                "two views of each sample are compared, which takes two seeds, but this run has "
                f"only {describe_seeds(sorted(set(seeds)))}.",
                hint="Record more with `kd-cache build FILE --seeds 0:2`, or name them in `seeds`.",
            )
        self._num_labels = self.num_samples = len(labels_N)
        self._seeds, self._repeats = seeds, repeats
        self.identity: dict[str, float] = {}
        self._pairings = [pairing(labels_N, seeds) for pairing in requirements.other_views]
        self._enriched: EnrichedEpochs | None = None
        if requirements.special_classes is not None:
            self._enriched = EnrichedEpochs(labels_N, requirements.special_classes)
            self.num_samples = self._enriched.num_samples
            self.identity = {"oversampling": self._enriched.oversampling}

    def positions(self, start: int, stop: int, *, seed: int, epoch: int) -> Positions:
        """The recorded positions of a seed that are places `start` to `stop` of an epoch.

        During the first pass over the seeds they are read as recorded, later in the order of
        `pass_order`.
        """
        turn = epoch // len(self._seeds)
        if self._enriched is not None:
            return self._enriched.positions(seed, epoch, turn)[start:stop]
        if turn == 0:
            return np.arange(start, stop, dtype=np.int64)
        # A copy, because the order is shared and read-only.
        return pass_order(self._num_labels, seed, self._repeats, turn)[start:stop].copy()

    def other_views(
        self, positions_B: Positions, *, seed: int, epoch: int
    ) -> dict[str, tuple[int, Positions]]:
        """Seed and recorded positions of the other views of a batch, by name of their pairing."""
        if not self._pairings:
            return {}
        if self._repeats > 1:
            next_N = _next_views(self._num_labels, seed, self._repeats)
            return {SecondView.name: (seed, next_N[positions_B])}
        views = {}
        samples_B = epoch_order(self._num_labels, seed)[positions_B]
        for pairing in self._pairings:
            other, others_B = pairing.choose(samples_B, seed=seed, epoch=epoch)
            positions_B = positions_in(other, others_B, num_samples=self._num_labels)
            views[pairing.name] = other, positions_B
        return views


class SecondView(Pairing):
    """The same sample under another seed."""

    name = "second_view"
    seeds_per_epoch = 2

    def choose(self, samples_B: Samples, *, seed: int, epoch: int) -> tuple[int, Samples]:  # noqa: ARG002
        """The samples themselves, under the seed of `other_seed`."""
        return other_seed(self.seeds, epoch), samples_B


def _refuse_with_repeats(requirements: Requirements, repeats: int) -> None:
    """Only second views are possible: those of the same seed."""
    what = "another sample of the same class in the same seed"
    if requirements.prediction_history:
        what = "its own predictions for every sample an epoch before"
    elif requirements.special_classes is not None:
        what = "every sample of its special classes in every epoch"
    elif set(requirements.other_views) <= {SecondView}:
        return
    raise UnsupportedError(
        f"a method of this run requires {what}, but with augment.repeats={repeats} an epoch visits "
        f"one sample in {repeats}.",
        hint="Use a recipe without repeats for it.",
    )


@lru_cache(maxsize=4)
def _next_views(num_samples: int, seed: int, repeats: int) -> Positions:
    """For each position, that of the next view of its sample in the seed; the last has the first.

    A sample that is cut by the edge of a part may have one view only, which is then its own second.
    """
    found = visits(num_samples, seed, repeats)
    by_sample_N = np.lexsort((found.draw_seeds_N, found.samples_N))
    sorted_N = found.samples_N[by_sample_N]
    starts = np.flatnonzero(np.diff(sorted_N, prepend=-1))
    next_N = np.roll(by_sample_N, -1)
    next_N[np.append(starts[1:], num_samples) - 1] = by_sample_N[starts]
    views_N = np.empty(num_samples, np.int64)
    views_N[by_sample_N] = next_N
    return views_N


def other_seed(seeds: Sequence[int], epoch: int) -> int:
    """The seed of the second views of an epoch, of at least two seeds in use.

    During the first pass over the seeds it is half of them away, so that with twice as many seeds
    as epochs every view is used once. Each further pass takes another distance.
    """
    turn, index = divmod(epoch, len(seeds))
    distance = 1 + (len(seeds) // 2 - 1 + turn) % (len(seeds) - 1)
    return seeds[(index + distance) % len(seeds)]


class SameClassPair(Pairing):
    """Another sample of the same class, drawn anew each epoch, under the same seed.

    The only sample of a class is paired with itself.
    """

    name = "same_class_pair"

    def __init__(self, labels_N: Samples, seeds: Sequence[int]) -> None:
        super().__init__(labels_N, seeds)
        by_class_N = np.argsort(labels_N, kind="stable")
        _, first_K, sizes_K = np.unique(labels_N[by_class_N], return_index=True, return_counts=True)
        self._by_class_N = by_class_N
        self._rank_N = np.empty_like(by_class_N)
        self._rank_N[by_class_N] = np.arange(len(labels_N)) - np.repeat(first_K, sizes_K)
        self._first_N, self._size_N = np.empty_like(by_class_N), np.empty_like(by_class_N)
        self._first_N[by_class_N] = np.repeat(first_K, sizes_K)
        self._size_N[by_class_N] = np.repeat(sizes_K, sizes_K)

    def choose(self, samples_B: Samples, *, seed: int, epoch: int) -> tuple[int, Samples]:
        """A sample of the class of each one, a function of (seed, epoch, sample) alone."""
        words_B = _philox_words(SAME_CLASS_KEY, seed, epoch, len(self._rank_N))[samples_B]
        size_B = self._size_N[samples_B]
        steps_B = 1 + _uniform_below(words_B, np.maximum(size_B - 1, 1))
        rank_B = (self._rank_N[samples_B] + steps_B) % size_B
        return seed, self._by_class_N[self._first_N[samples_B] + rank_B]


class EnrichedEpochs:
    """Epochs in which half of the samples are of special classes, the other half of all others.

    Each epoch has every sample of the special classes once and equally many of the others, drawn
    anew, or all of those where there are fewer. They keep the order of the pass over the seed.

    Attributes:
        num_samples: of an epoch.
        oversampling: how much more frequent the special classes are, against all others, than in
            the dataset.

    Raises:
        ConfigError: no sample has one of these classes.

    Source: Hinton et al. 2015, section 5.2.
    """

    def __init__(self, labels_N: Samples, special_classes: Sequence[int]) -> None:
        self._is_special_N = np.isin(labels_N, special_classes)
        num_special = int(self._is_special_N.sum())
        if num_special == 0:
            raise ConfigError(
                f"the dataset has no sample of method.classes={list(special_classes)}."
            )
        num_others = len(labels_N) - num_special
        self._num_drawn = min(num_special, num_others)
        self.num_samples = num_special + self._num_drawn
        self.oversampling = num_others / self._num_drawn if self._num_drawn else 1.0
        self._latest: tuple[tuple[int, int], Positions] | None = None

    def positions(self, seed: int, epoch: int, turn: int = 0) -> Positions:
        """The recorded positions of a whole epoch, rising in the first pass over the seed."""
        if self._latest is None or self._latest[0] != (seed, epoch):
            words_N = _philox_words(SPECIAL_KEY, seed, epoch, len(self._is_special_N))
            others = np.flatnonzero(~self._is_special_N)
            drawn = others[np.argsort(words_N[others], kind="stable")[: self._num_drawn]]
            chosen_N = self._is_special_N.copy()
            chosen_N[drawn] = True
            read_N = pass_order(len(chosen_N), seed, 1, turn)
            is_read_N = chosen_N[epoch_order(len(chosen_N), seed)[read_N]]
            self._latest = (seed, epoch), read_N[is_read_N]
        return self._latest[1]


def positions_in(seed: int, samples_B: Samples, *, num_samples: int) -> Positions:
    """The recorded positions of these samples under a seed."""
    positions_B: Positions = _inverse_order(num_samples, seed)[samples_B].astype(np.int64)
    return positions_B


@lru_cache(maxsize=4)
def _inverse_order(num_samples: int, seed: int) -> NDArray[np.int32]:
    return positions_of(epoch_order(num_samples, seed))


@lru_cache(maxsize=2)
def _philox_words(key: int, seed: int, epoch: int, count: int) -> NDArray[np.uint64]:
    """One Philox word for each sample, from a stream that no other draw reads."""
    counter = np.array([0, 0, epoch, 0], dtype=np.uint64)
    bits = np.random.Philox(key=np.array([key, seed], dtype=np.uint64), counter=counter)
    return bits.random_raw(count)


def _uniform_below(words_B: NDArray[np.uint64], counts_B: Samples) -> Positions:
    """Uniform integers from 0 up to each count, exclusive, from the high 32 bits of each word."""
    half = np.uint64(32)
    return ((words_B >> half) * counts_B.astype(np.uint64) >> half).astype(np.int64)
