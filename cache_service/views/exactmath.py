"""exp and log that give the same bits on every machine.

The C library and NumPy's vector kernels may differ in the last bit between CPUs and versions. Only
+, -, *, / and scaling by powers of two are used here, which IEEE 754 rounds alike everywhere, so a
draw that passes through a logarithm is as portable as an integer one. Not fast, and not meant to
be: errors stay below 4 units in the last place over the ranges that draws use.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Reals: TypeAlias = NDArray[np.float64]

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
