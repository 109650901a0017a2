"""Random words to random values, by our own arithmetic: what a draw is made of.

Every value is an integer, or a real number kept as an integer count of 65536ths ("fixed"). Values
are therefore the same on every machine and in every version of every library, and a draw has one
canonical form: a row of int64.

Shape letters: B samples, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cache_service.views.exactmath import exact_exp, exact_log, exact_pow
from cache_service.views.philox import WORDS_PER_BLOCK, Words, philox_blocks

Ints: TypeAlias = NDArray[np.int64]

ONE = 1 << 16
"""1.0 as a fixed number. 1/65536 is far below what a pixel can show, far above a rounding error."""

VIEW_KEY = int.from_bytes(b"kd-views", "big")
"""Key of the streams that draws are made from."""

_TOP_53 = np.uint64(11)
"""Shift that keeps the 53 bits a float64 holds exactly."""
_TOP_32 = np.uint64(32)


def draw_words(seed: int, samples_B: NDArray[np.integer], num_words: Sequence[int]) -> list[Words]:
    """Words of several streams for each sample: one [B, W] array per entry of `num_words`.

    Stream s of a sample is NumPy's Philox stream with key (VIEW_KEY, seed) and counter
    (0, sample, s, 0): a pure function of seed, sample and s, whatever the other streams take.
    """
    num_blocks = [-(-count // WORDS_PER_BLOCK) for count in num_words]
    streams_K = np.repeat(np.arange(len(num_blocks)), num_blocks)
    # NumPy steps the counter before its first block, so blocks count from 1.
    blocks_K = np.concatenate([np.arange(1, n + 1) for n in num_blocks] or [streams_K])
    counters_4BK = np.zeros((4, len(samples_B), len(streams_K)), dtype=np.uint64)
    counters_4BK[0] = blocks_K
    counters_4BK[1] = np.asarray(samples_B)[:, None]
    counters_4BK[2] = streams_K
    words_4BK = philox_blocks((VIEW_KEY, seed), counters_4BK.reshape(4, -1))
    words_BW = words_4BK.T.reshape(len(samples_B), WORDS_PER_BLOCK * len(streams_K))
    starts = np.cumsum([0, *num_blocks]) * WORDS_PER_BLOCK
    return [words_BW[:, s : s + w] for s, w in zip(starts, num_words, strict=False)]


def uniform(words: Words) -> NDArray[np.float64]:
    """Uniform in [0, 1), in steps of 2**-53."""
    return (words >> _TOP_53).astype(np.float64) * 2.0**-53


def chance(words: Words, prob: float) -> NDArray[np.bool_]:
    """True with probability `prob`; never for 0, always for 1."""
    return uniform(words) < prob


def below(words: Words, count: int) -> Ints:
    """Uniform integers in [0, count), count < 2**32, by multiplying and shifting 32 bits."""
    return ((words >> _TOP_32) * np.uint64(count) >> _TOP_32).astype(np.int64)


def to_fixed(value: float) -> int:
    """A real number to the nearest count of 65536ths, halves upward."""
    return int(np.floor(value * ONE + 0.5))


def uniform_fixed(words: Words, low: float, high: float) -> Ints:
    """Uniform in [low, high], as fixed numbers."""
    return _round(low + uniform(words) * (high - low))


def log_uniform_fixed(words: Words, low: float, high: float) -> Ints:
    """Uniform in the logarithm from low to high (> 0), as fixed numbers of at least 1/65536."""
    log_low, log_high = exact_log(np.array([low, high]))
    values = _round(exact_exp(log_low + uniform(words) * (log_high - log_low)))
    return np.clip(values, max(1, to_fixed(low)), max(1, to_fixed(high)))


def beta_fixed(words: Words, alpha: float) -> Ints:
    """Beta(alpha, alpha), as fixed numbers from 0 to 65536."""
    return np.searchsorted(_beta_steps(alpha), uniform(words), side="right").astype(np.int64)


@lru_cache(maxsize=8)
def _beta_steps(alpha: float) -> NDArray[np.float64]:
    """Distribution function of Beta(alpha, alpha) halfway between fixed numbers: [65536].

    Between two such places the factor t**(alpha - 1), which is infinite at 0 for alpha < 1, is
    integrated in closed form (substitute s = t**alpha) and the smooth factor (1 - t)**(alpha - 1)
    is averaged over the ends; the upper half follows by symmetry. Error < 1e-7.
    """
    halfway = (np.arange(ONE // 2) + 0.5) / ONE
    ends = np.concatenate([[0.0], halfway, [0.5]])
    powers = np.concatenate([[0.0], exact_pow(ends[1:], alpha)])
    smooth = exact_pow(1.0 - ends, alpha - 1.0)
    pieces = (powers[1:] - powers[:-1]) * (smooth[1:] + smooth[:-1])
    mass = np.add.accumulate(pieces)  # one after the other: a pairwise sum may differ by CPU
    lower = 0.5 * mass[:-1] / mass[-1]
    return np.concatenate([lower, 1.0 - lower[::-1]])


def _round(values: NDArray[np.float64]) -> Ints:
    return np.floor(values * ONE + 0.5).astype(np.int64)
