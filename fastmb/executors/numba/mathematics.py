"""Elementary functions: the polynomials of csrc/math.inc, operation for operation, and so their bits and their errors.

exp and expm1 of x <= 0, log1p on [0, 1], log of x >= 1, the normal distribution's tail. NaN gives NaN.
"""

from __future__ import annotations

import math

from .emit import Emitter, Value

_EXPM1 = (
    (1.394677e-03, 8.366609e-03, 4.1666277e-02, 1.6666543e-01, 0.5),
    (
        2.5114429823042423e-08,
        2.762638215644154e-07,
        2.7557228082642847e-06,
        2.4801504311996252e-05,
        0.00019841269902893822,
        0.0013888888932484613,
        0.008333333333314654,
        0.04166666666657332,
        0.16666666666666685,
        0.5000000000000006,
    ),
)
_LOG1P = (
    (
        -3.3196462e-03,
        2.0210236e-02,
        -5.7675693e-02,
        1.0681749e-01,
        -1.5356123e-01,
        1.9695655e-01,
        -2.4958636e-01,
        3.3330515e-01,
        -4.999993e-01,
    ),
    (
        2.5328357511445102e-05,
        -0.0002917457673636667,
        0.0015956715800282105,
        -0.005542917802481104,
        0.013838230538862498,
        -0.026743472253959573,
        0.042299607642082786,
        -0.05750160829764392,
        0.0703551684358092,
        -0.0808119946015215,
        0.09013149320565508,
        -0.09981013763649811,
        0.11107505771570667,
        -0.1249947958285895,
        0.14285658894772438,
        -0.1666666249842412,
        0.19999999791327952,
        -0.24999999993677197,
        0.33333333333235066,
        -0.4999999999999946,
    ),
)
_NORMAL_P = (
    (4.016305e-03, 3.995896e-02, 1.8123354e-01, 4.3559e-01, 0.5),
    (
        2.230191927977686e-07,
        6.945375254491248e-06,
        0.00010617689557785344,
        0.0010364612001597805,
        0.007104294760571873,
        0.035591697476265796,
        0.13182267047199986,
        0.3568894216479929,
        0.6790191974558947,
        0.8275471119752196,
        0.5,
    ),
)
_NORMAL_Q = (
    (1.006724e-02, 1.00169666e-01, 4.641866e-01, 1.1941841, 1.6690649, 1.0),
    (
        5.590262144521342e-07,
        1.7409473990861428e-05,
        0.0002667050347791533,
        0.00261543242408056,
        0.01807285406500304,
        0.09177835953775078,
        0.347711550021167,
        0.9787824625754467,
        1.9994813546354029,
        2.8152322952434186,
        2.4529787847533044,
        1.0,
    ),
)


def _polynomial(e: Emitter, x: Value, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Value:
    first, *others = coefficients[e.double]
    q: Value | float = e.number(first)
    for c in others:
        q = e.fma(q, x, c)
    assert isinstance(q, Value)
    return q


def exp_parts(e: Emitter, x: Value, low: Value | float = 0.0) -> tuple[Value, Value]:
    """P and s with exp(x - low) = s (1 + p): s = 2^n, p = expm1(r), r = x - low - n ln 2; x <= 0."""
    mantissa, bias = (52, 1023) if e.double else (23, 127)
    magic = float((3 << (mantissa - 1)) + bias)
    x = e.at_least(x, e.number(-88.0, -709.4))
    n = e.fma(x, e.number(1.44269504, 1.4426950408889634), magic)
    s = e.from_bits(e.bits(n) << mantissa)
    n = n - magic
    r = e.fma(n, e.number(-0.693145751953125, -0.6931471803691238), x) - low
    r = e.fma(n, e.number(-1.42860682031e-6, -1.9082149292705878e-10), r)
    return e.fma(r * r, _polynomial(e, r, _EXPM1), r), s


def exp(e: Emitter, x: Value) -> Value:
    """exp(x), x <= 0."""
    p, s = exp_parts(e, x)
    return e.fma(s, p, s)


def log1p(e: Emitter, x: Value) -> Value:
    """log(1 + x), 0 <= x <= 1."""
    return e.fma(x * x, _polynomial(e, x, _LOG1P), x)


def log(e: Emitter, x: Value) -> Value:
    """log(x), x >= 1."""
    mantissa, bias = (52, 1023) if e.double else (23, 127)
    i = e.bits(x)
    k = e.from_bits((i >> mantissa) | ((bias + mantissa) << mantissa)) - float((1 << mantissa) + bias)
    m = e.from_bits((i & ((1 << mantissa) - 1)) | (bias << mantissa))
    y = e.fma(k, e.number(0.693147182, 0.6931471805599453), log1p(e, m - 1))
    return e.select(x < math.inf, y, x)


def normal_tail(e: Emitter, x: Value) -> tuple[Value, Value]:
    """Phi(-x), the normal distribution's lower tail, and exp(-x^2 / 2); 0 <= x <= 40."""
    if e.target.fma:
        high = -0.5 * x * x
        low = e.fma(0.5 * x, x, high)
    else:
        head = e.from_bits(e.bits(x) & (-1 << (27 if e.double else 12)))  # its square is exact
        high = -0.5 * head * head
        low = 0.5 * (x - head) * (x + head)
    p, s = exp_parts(e, high, low)
    g = e.fma(s, p, s)
    return g * _polynomial(e, x, _NORMAL_P) / _polynomial(e, x, _NORMAL_Q), g
