"""In which order a seed visits the samples, and with which draws.

By default a seed visits every sample once. With `augment.repeats: k` it visits one k-th of them,
each k times: seed s takes part s mod k of all samples, so any k consecutive seeds visit every
sample k times. The k views of a sample have the draws that it has under the seeds ck to ck + k - 1
of a recipe without repeats, where c is s / k rounded down. A seed always has as many positions as
the dataset has samples. If k does not divide their number, the parts are cut in the middle of a
sample, whose remaining views are in the next seed.

Decoding an image once for its k views requires that their positions are close; see decision 026.

Everything is a pure function of (number of samples, repeats, seed, pass). The orders of large
datasets are computed by one process of a computer and mapped by the others.
Shape letters: B positions, I images, K places, N samples or positions, R repeats, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.shared_arrays import computed_once
from cache_service.views.draws import Seeds

ORDER_KEY = int.from_bytes(b"kd-order", "big")
"""Key of the streams that orders are made from."""

PARTS_KEY = int.from_bytes(b"kd-parts", "big")
"""Key of the stream that divides the samples into the parts of k seeds."""

WINDOW_VIEWS = 64
"""Positions within which all views of an image lie, with repeats of at most 32."""

PASS_KEY = int.from_bytes(b"kd-again", "big")
"""Key of the streams that orders of later passes are made from."""

BLOCK_ROWS = 1024
"""Positions that a later pass reads before it goes on elsewhere: a few chunks at most."""

SHARED_SAMPLES = 1 << 18
"""Samples from which orders, of 1 MiB and more, are shared between processes."""


class Visits(NamedTuple):
    """What a seed visits, by position. The arrays are read-only, because they are shared.

    Attributes:
        samples_N: int32.
        draw_seeds_N: uint64, the seed whose draws a view has.
        first_RU: int64, the even position of each unit of two images, by repeat. The odd position
            after it is the other image's. Positions from `first_RU.size * 2` on are in no unit.
    """

    samples_N: NDArray[np.int32]
    draw_seeds_N: NDArray[np.uint64]
    first_RU: NDArray[np.int64]


def epoch_order(num_samples: int, seed: int, repeats: int = 1) -> NDArray[np.int32]:
    """Sample at each position of a seed: int32 [num_samples], read-only because it is shared.

    Without repeats, each sample gets one Philox word, and samples are visited by ascending word.
    Equal words (one epoch of ImageNet in 20 million has a pair) keep the order of their samples.
    The order does not depend on the ops of a recipe, so caches of different teachers over one
    dataset agree position by position.
    """
    if repeats == 1:
        return _plain_order(num_samples, seed)
    return visits(num_samples, seed, repeats).samples_N


def draw_seeds(num_samples: int, seed: int, repeats: int, positions_B: NDArray[np.int64]) -> Seeds:
    """The seed whose draws the views at these positions have: one for all without repeats."""
    return seed if repeats == 1 else visits(num_samples, seed, repeats).draw_seeds_N[positions_B]


def positions_of(order_N: NDArray[np.int32]) -> NDArray[np.int32]:
    """Position of each sample: the inverse of `epoch_order` without repeats, by one scatter."""
    positions_N = np.empty_like(order_N)
    positions_N[order_N] = np.arange(len(order_N), dtype=np.int32)
    return positions_N


def _once(
    num_samples: int, name: str, make: Callable[[], Sequence[NDArray[Any]]]
) -> Sequence[NDArray[Any]]:
    """Arrays of a pure function, read-only; those of many samples are shared between processes."""
    if num_samples >= SHARED_SAMPLES:
        return computed_once(f"{name}-of-{num_samples}", make)
    arrays = make()
    for array in arrays:
        array.flags.writeable = False
    return arrays


@lru_cache(maxsize=4)
def visits(num_samples: int, seed: int, repeats: int) -> Visits:
    """What a seed with at least two repeats visits."""
    name = f"visits-{seed}-{repeats}"
    return Visits(*_once(num_samples, name, lambda: _visits(num_samples, seed, repeats)))


def _visits(num_samples: int, seed: int, repeats: int) -> Visits:
    """The samples and draws of a seed with at least two repeats.

    Two images are a unit: the positions 2j and 2j + 1, partners in mixing, are views of them. A
    window consists of the views of a few units. It has a run for each repeat, and every run visits
    the units of the window in another order. The images that are left over, of which there are at
    most five, are visited last, in turn.
    """
    seed_of_cycle, part = seed // repeats * repeats, seed % repeats
    first, stop = part * num_samples, (part + 1) * num_samples
    # Entry e is repeat e % k of the image with rank e // k in the fixed order of all samples.
    whole = range(-(-first // repeats), max(stop // repeats, -(-first // repeats)))
    cut = [e for e in _edges(first, stop, repeats) if e // repeats not in whole]
    words = np.random.Philox(key=np.array([ORDER_KEY, seed], dtype=np.uint64))
    ranks_I = whole.start + np.argsort(words.random_raw(len(whole)), kind="stable")
    num_units = len(whole) // 2
    if num_units and (cut or len(whole) % 2):
        num_units -= 1  # its images take turns with those that are left over
    units_K, repeats_K = _in_windows(words, num_units, repeats)
    paired_K2 = ranks_I[: 2 * num_units].reshape(-1, 2)[units_K] * repeats + repeats_K[:, None]
    entries_N = np.concatenate(
        [paired_K2.reshape(-1), _take_turns(ranks_I[2 * num_units :], cut, repeats)]
    )
    first_RU = np.empty((repeats, num_units), np.int64)
    first_RU[repeats_K, units_K] = np.arange(0, 2 * len(units_K), 2)
    samples_N = _fixed_order(num_samples)[entries_N // repeats]
    draw_seeds_N = np.uint64(seed_of_cycle) + (entries_N % repeats).astype(np.uint64)
    return Visits(samples_N, draw_seeds_N, first_RU)


@lru_cache(maxsize=4)
def pass_order(num_samples: int, seed: int, repeats: int, turn: int) -> NDArray[np.int64]:
    """Positions of a seed in the order in which pass `turn` over it reads them: int64 [N].

    The first pass, 0, reads them as recorded. A later pass reads blocks of positions in a random
    order, and the units of each block in a random order, so that its batches are different ones.
    Mixing partners stay neighbors, and the views of an image stay in a window.
    """
    if turn == 0:
        return np.arange(num_samples)
    name = f"pass-{turn}-{seed}-{repeats}"
    return _once(num_samples, name, lambda: [_pass_order(num_samples, seed, repeats, turn)])[0]


def _pass_order(num_samples: int, seed: int, repeats: int, turn: int) -> NDArray[np.int64]:
    if repeats == 1:
        first_RU = np.arange(0, num_samples - 1, 2)[None]
    else:
        first_RU = visits(num_samples, seed, repeats).first_RU
    num_units = first_RU.shape[1]
    per_block = max(1, BLOCK_ROWS // (2 * repeats))
    counter = np.array([0, turn, 0, 0], dtype=np.uint64)
    words = np.random.Philox(key=np.array([PASS_KEY, seed], dtype=np.uint64), counter=counter)
    # Blocks begin elsewhere in each pass, and never near a multiple of their size. Otherwise a
    # batch of the size of a block would not change.
    offset = per_block // 4 + int(words.random_raw()) % (per_block // 2 + 1)
    blocks_U = (np.arange(num_units) + offset) // per_block
    block_words = words.random_raw(num_units // per_block + 2)
    units_U = np.lexsort((words.random_raw(num_units), block_words[blocks_U]))
    if repeats == 1:
        first_K = first_RU[0, units_U]
    else:
        places_K, repeats_K = _in_windows(words, num_units, repeats)
        first_K = first_RU[repeats_K, units_U[places_K]]
    return np.concatenate(
        [
            np.stack([first_K, first_K + 1], axis=1).reshape(-1),
            np.arange(2 * first_RU.size, num_samples),
        ]
    )


@lru_cache(maxsize=4)
def _plain_order(num_samples: int, seed: int) -> NDArray[np.int32]:
    return _once(num_samples, f"order-{seed}", lambda: [_shuffled(num_samples, ORDER_KEY, seed)])[0]


@lru_cache(maxsize=1)
def _fixed_order(num_samples: int) -> NDArray[np.int32]:
    """All samples in the order that is divided into parts. It is the same for every seed."""
    return _once(num_samples, "fixed", lambda: [_shuffled(num_samples, PARTS_KEY, 0)])[0]


def _shuffled(num_samples: int, key: int, seed: int) -> NDArray[np.int32]:
    words_N = np.random.Philox(key=np.array([key, seed], dtype=np.uint64)).random_raw(num_samples)
    return np.argsort(words_N, kind="stable").astype(np.int32)


def _in_windows(
    words: np.random.Philox, num_units: int, repeats: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Unit and repeat at each pair of positions: windows of units, in them a run per repeat."""
    size = max(1, WINDOW_VIEWS // (2 * repeats))
    num_windows = -(-num_units // size)
    random_WRU = words.random_raw(num_windows * repeats * size).reshape(-1, repeats, size)
    units_WRU = np.argsort(random_WRU, axis=-1, kind="stable")
    units_WRU += (np.arange(num_windows) * size)[:, None, None]
    repeats_WRU = np.broadcast_to(np.arange(repeats)[:, None], units_WRU.shape)
    exists_WRU = units_WRU < num_units  # the last window may be shorter
    return units_WRU[exists_WRU], repeats_WRU[exists_WRU]


def _edges(first: int, stop: int, repeats: int) -> list[int]:
    """Entries that may be of an image whose views a part has only some of."""
    return sorted({*range(first, stop)[:repeats], *range(first, stop)[-repeats:]})


def _take_turns(whole_ranks: NDArray[np.int64], cut: list[int], repeats: int) -> NDArray[np.int64]:
    """Entries of the last images, so that neighbors are of different images where there are two."""
    entries = [rank * repeats + r for rank in whole_ranks.tolist() for r in range(repeats)] + cut
    return np.array(sorted(entries, key=lambda e: e % repeats), np.int64)
