"""Powers, logarithms and cosines of arrays by + - * / and sqrt alone: the same bits on every machine, in any company.

NumPy's own come from a library or a vector unit that differs between machines. Here an element's bits depend on that
element only, so a schedule may be evaluated step by step or an epoch at a time.
"""

from __future__ import annotations

from math import factorial, pi

import numpy as np

_COS = [(-1) ** k / factorial(2 * k) for k in range(9)]  # up to y^16: 2^-58 is left of the series at pi/4
_ATANH = [1 / (2 * k + 1) for k in range(12)]  # up to y^22, |y| <= 0.172
_LOG_2 = 0.6931471805599453
_SIN = [(-1) ** k / factorial(2 * k + 1) for k in range(9)]


def power(base: float | np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """``base ** exponents`` for integers >= 0, by repeated squaring; infinite where it is too large."""
    powers = np.ones(len(exponents))
    for bit in range(int(exponents.max(initial=0)).bit_length()):
        powers = np.where(exponents >> bit & 1, powers * base, powers)
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
