"""Powers, logarithms and cosines of arrays by + - * / and sqrt alone: the same bits on every machine, in any company.

NumPy's own come from a library or a vector unit that differs between machines. Here an element's bits depend on that
element only, so a schedule may be evaluated step by step or an epoch at a time.
"""

from __future__ import annotations

from functools import lru_cache
from math import factorial, pi

import numpy as np

_COS = [(-1) ** k / factorial(2 * k) for k in range(9)]  # up to y^16: 2^-58 is left of the series at pi/4
_ATANH = [1 / (2 * k + 1) for k in range(12)]  # up to y^22, |y| <= 0.172
_LOG_2 = 0.6931471805599453
_SIN = [(-1) ** k / factorial(2 * k + 1) for k in range(9)]


_LOW = 10  # binary digits of an exponent whose powers are kept


def power(base: float | np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """``base ** exponents`` for integers >= 0, by repeated squaring; infinite where it is too large."""
    if isinstance(base, np.ndarray):
        return _times_powers(np.ones(len(exponents)), base, exponents)
    powers = _low_powers(base)[exponents & ((1 << _LOW) - 1)]
    for _ in range(_LOW):
        base = base * base
    return _times_powers(powers, base, exponents >> _LOW)


@lru_cache(maxsize=64)
def _low_powers(base: float) -> np.ndarray:
    with np.errstate(over="ignore"):  # of exponents that nobody may have asked for
        return _times_powers(np.ones(1 << _LOW), base, np.arange(1 << _LOW))


def _times_powers(powers: np.ndarray, base: float | np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """``powers`` times ``base ** exponents``, a factor for each binary digit, the lowest first."""
    low, high = int(exponents.min(initial=1 << 62)), int(exponents.max(initial=0))
    for bit in range(high.bit_length()):
        if (low ^ high) >> bit:
            powers = np.where(exponents >> bit & 1, powers * base, powers)
        elif high >> bit & 1:  # in all of them, and so are the digits above
            powers = powers * base
        base = base * base
    return powers


def real_power(bases: np.ndarray, exponent: float) -> np.ndarray:
    """``bases ** exponent`` for bases in [0, 1] and an exponent >= 0: squares for its integer part, roots for the rest.

    The roots of roots are those of the binary digits of the exponent, 1/2, 1/4, ...
    """
    whole, rest = divmod(exponent, 1.0)
    powers = np.ones(len(bases))
    factor, n = bases, int(whole)
    while n:
        if n & 1:
            powers = powers * factor
        factor, n = factor * factor, n >> 1
    factor = bases
    while rest:
        factor = np.sqrt(factor)
        whole, rest = divmod(2 * rest, 1.0)
        if whole:
            powers = powers * factor
    return powers


def log(x: np.ndarray) -> np.ndarray:
    """``log(x)`` for finite x > 0, to some 3 ulp: x = 2^n m, sqrt(1/2) <= m < sqrt(2), log m = 2 atanh(y)."""
    m, n = np.frexp(x)
    low = m < 0.7071067811865476
    m, n = np.where(low, 2 * m, m), n - low
    y = (m - 1) / (m + 1)
    return n * _LOG_2 + 2 * y * _series(_ATANH, y)


def cospi(x: np.ndarray) -> np.ndarray:
    """``cos(pi x)`` for x >= 0, to some 2 ulp of 1: exact reductions to [0, 1/4], then a Taylor series."""
    x = np.fmod(x, 2.0)
    x = np.where(x > 1, 2 - x, x)
    left = x <= 0.5
    x = np.where(left, x, 1 - x)
    cosine = _series(_COS, pi * x)
    y = pi * (0.5 - x)
    value = np.where(x <= 0.25, cosine, y * _series(_SIN, y))
    return np.where(left, value, -value)


def _series(coefficients: list[float], y: np.ndarray) -> np.ndarray:
    square = y * y
    total = np.full(len(y), coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * square + coefficient
    return total
