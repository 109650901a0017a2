"""Random choices of recorded epochs: counter-based random words, and values made of them.

Every choice is a pure function of a seed and a sample. NumPy promises that the bit stream of its
Philox generator never changes; what its distributions make of those bits may change. So words come
from Philox, and everything after them is integer arithmetic or float64 operations that IEEE 754
rounds alike everywhere. A value is an integer, or a real number kept as an integer count of
65536ths ("fixed"), so the draws of a view have one canonical form: a row of int64.

Shape letters: B samples, K blocks of four words, N counters or samples, W words.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint64]
Ints: TypeAlias = NDArray[np.int64]
Reals: TypeAlias = NDArray[np.float64]

VIEW_KEY = int.from_bytes(b"kd-views", "big")
"""Key of the streams that the draws of views are made from. Noise has a key of its own."""

ONE = 1 << 16
"""1.0 as a fixed number. 1/65536 is far below what a pixel can show, far above a rounding error."""

# Philox4x64-10 over many counters at once: NumPy's words, at 3 us a sample instead of 20.

WORDS_PER_BLOCK = 4
"""One counter value gives four 64-bit words."""

_NUM_ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)
_KEY_STEPS = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], dtype=np.uint64)
_LOW_HALF = np.uint64(0xFFFFFFFF)
_HALF_BITS = np.uint64(32)
_MULTIPLIERS_LOW = _MULTIPLIERS & _LOW_HALF
_MULTIPLIERS_HIGH = _MULTIPLIERS >> _HALF_BITS


def philox_blocks(key: tuple[int, int | Words], counters_4N: Words) -> Words:
    """Four words for each counter, taken as it is: [4, N], least significant counter word first.

    The second word of the key may be an array [N], one for each counter.
    """
    even_2N, odd_2N = counters_4N[0::2], counters_4N[1::2]
    # Shape [2, 1] or [2, N].
    key_2N = np.array(np.broadcast_arrays(*(np.atleast_1d(np.array(k, np.uint64)) for k in key)))
    for _ in range(_NUM_ROUNDS):
        high_2N, low_2N = _multiply(even_2N)
        # Each half is combined with the high product of the *other* half.
        even_2N = high_2N[::-1] ^ odd_2N ^ key_2N
        odd_2N = low_2N[::-1]
        key_2N += _KEY_STEPS
    words_4N = np.empty_like(counters_4N)
    words_4N[0::2], words_4N[1::2] = even_2N, odd_2N
    return words_4N


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


Seeds: TypeAlias = int | NDArray[np.uint64]
"""The seed of several draws: one for all, or one for each sample, [B]."""


def draw_words(
    seed: Seeds, samples_B: NDArray[np.integer], num_words: Sequence[int]
) -> list[Words]:
    """Words of several streams for each sample: one [B, W] array per entry of `num_words`.

    Stream s of a sample is NumPy's Philox stream with key (VIEW_KEY, seed) and counter
    (0, sample, s, 0). It depends on seed, sample and s only, not on how much other streams draw.
    """
    num_blocks = [-(-count // WORDS_PER_BLOCK) for count in num_words]
    streams_K = np.repeat(np.arange(len(num_blocks)), num_blocks)
    # NumPy steps the counter before its first block, so blocks count from 1.
    blocks_K = np.concatenate([np.arange(1, n + 1) for n in num_blocks] or [streams_K])
    counters_4BK = np.zeros((4, len(samples_B), len(streams_K)), dtype=np.uint64)
    counters_4BK[0] = blocks_K
    counters_4BK[1] = np.asarray(samples_B)[:, None]
    counters_4BK[2] = streams_K
    seeds = seed if isinstance(seed, int) else np.repeat(seed, len(streams_K))
    words_4BK = philox_blocks((VIEW_KEY, seeds), counters_4BK.reshape(4, -1))
    words_BW = words_4BK.T.reshape(len(samples_B), WORDS_PER_BLOCK * len(streams_K))
    starts = np.cumsum([0, *num_blocks]) * WORDS_PER_BLOCK
    return [words_BW[:, s : s + w] for s, w in zip(starts, num_words, strict=False)]


# Values from words.

_TOP_53 = np.uint64(11)
"""Shift that keeps the 53 bits a float64 holds exactly."""
_TOP_32 = np.uint64(32)


def uniform(words: Words) -> Reals:
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
def _beta_steps(alpha: float) -> Reals:
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


def _round(values: Reals) -> Ints:
    return np.floor(values * ONE + 0.5).astype(np.int64)


# exp and log that give the same bits on every machine.

# The C library and NumPy's vector kernels may differ in the last bit between CPUs and versions.
# Only +, -, *, / and scaling by powers of two are used here, which IEEE 754 rounds alike
# everywhere. Errors stay below 4 units in the last place over the ranges that draws use.

_LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
"""ln 2 to 33 bits, so that its product with a small integer is exact."""
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_INVERSE_LN2 = 1.4426950408889634
_SQRT_HALF = 0.7071067811865476
_EXP_TERMS = 16
_LOG_TERMS = 12


def exact_exp(x: Reals) -> Reals:
    """e**x for |x| < 700, elementwise."""
    power = np.rint(x * _INVERSE_LN2)
    rest = (x - power * _LN2_HIGH) - power * _LN2_LOW
    total = np.ones_like(rest)
    for term in range(_EXP_TERMS, 0, -1):  # Horner: 1 + r/1 (1 + r/2 (1 + r/3 ...
        total = 1.0 + rest * total / term
    return np.ldexp(total, power.astype(np.int32))


def exact_log(x: Reals) -> Reals:
    """Natural logarithm of positive normal numbers, elementwise."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < _SQRT_HALF
    mantissa = np.where(small, 2.0 * mantissa, mantissa)
    power = exponent - small.astype(np.float64)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    total = np.zeros_like(ratio)
    for term in range(_LOG_TERMS, -1, -1):  # 2 atanh(r) = 2r (1 + r^2/3 + r^4/5 ...
        total = total * square + 1.0 / (2 * term + 1)
    return power * _LN2_HIGH + (power * _LN2_LOW + 2.0 * ratio * total)


def exact_pow(base: Reals, exponent: float) -> Reals:
    """base**exponent for bases in (0, 1], elementwise; what underflows is 0."""
    return exact_exp(np.maximum(exponent * exact_log(base), -700.0))
