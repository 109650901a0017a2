"""Philox4x64-10 over many counters at once: the same words as NumPy's generator, vectorized.

NumPy promises that the bit stream of its Philox never changes, so every random choice of this
package starts here; what NumPy makes of those bits (its distributions) it may change, so nothing
else of `numpy.random` is used. One generator object per sample would cost 20 us each; this costs
about 3 us per sample for a dozen words.

Shape letters: N blocks of four words, B streams, W words.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 3.3.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint64]

WORDS_PER_BLOCK = 4
"""One counter value gives four 64-bit words."""

_NUM_ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW_HALF = np.uint64(0xFFFFFFFF)
_HALF_BITS = np.uint64(32)
_MULTIPLIERS_LOW = _MULTIPLIERS & _LOW_HALF
_MULTIPLIERS_HIGH = _MULTIPLIERS >> _HALF_BITS


def philox_blocks(key: tuple[int, int], counters_4N: Words) -> Words:
    """Four words for each counter, taken as it is: [4, N], least significant counter word first."""
    even_2N, odd_2N = counters_4N[0::2], counters_4N[1::2]
    key_2 = list(key)
    for _ in range(_NUM_ROUNDS):
        high_2N, low_2N = _multiply(even_2N)
        # Each half is stirred by the high product of the *other* half.
        even_2N = high_2N[::-1] ^ odd_2N ^ np.array(key_2, dtype=np.uint64)[:, None]
        odd_2N = low_2N[::-1]
        key_2 = [(k + step) % 2**64 for k, step in zip(key_2, _KEY_STEPS, strict=True)]
    words_4N = np.empty_like(counters_4N)
    words_4N[0::2], words_4N[1::2] = even_2N, odd_2N
    return words_4N


def philox_words(key: tuple[int, int], counters_B4: Words, num_words: int) -> Words:
    """The first words of many streams: [B, num_words].

    Row b equals `numpy.random.Philox(key=key, counter=counters_B4[b]).random_raw(num_words)`,
    which steps its 256-bit counter *before* each block.
    """
    num_blocks = -(-num_words // WORDS_PER_BLOCK)
    num_streams = len(counters_B4)
    steps_K = np.arange(1, num_blocks + 1, dtype=np.uint64)
    counters_4BK = np.empty((WORDS_PER_BLOCK, num_streams, num_blocks), dtype=np.uint64)
    counters_4BK[0] = counters_B4[:, :1] + steps_K
    carry_BK = (counters_4BK[0] < steps_K).astype(np.uint64)
    for place in range(1, WORDS_PER_BLOCK):
        counters_4BK[place] = counters_B4[:, place : place + 1] + carry_BK
        carry_BK &= counters_4BK[place] == 0
    words_4N = philox_blocks(key, counters_4BK.reshape(WORDS_PER_BLOCK, -1))
    words_BW = words_4N.T.reshape(num_streams, num_blocks * WORDS_PER_BLOCK)
    return words_BW[:, :num_words]


def _multiply(factors_2N: Words) -> tuple[Words, Words]:
    """High and low words of the 128-bit products with the two multipliers, by 32-bit halves."""
    low_2N = factors_2N & _LOW_HALF
    high_2N = factors_2N >> _HALF_BITS
    cross_2N = low_2N * _MULTIPLIERS_HIGH
    middle_2N = low_2N
    middle_2N *= _MULTIPLIERS_LOW
    middle_2N >>= _HALF_BITS
    middle_2N += cross_2N & _LOW_HALF
    middle_2N += high_2N * _MULTIPLIERS_LOW  # at most 2**64 - 1: no carry is lost
    middle_2N >>= _HALF_BITS
    cross_2N >>= _HALF_BITS
    high_2N *= _MULTIPLIERS_HIGH
    high_2N += cross_2N
    high_2N += middle_2N
    return high_2N, factors_2N * _MULTIPLIERS
