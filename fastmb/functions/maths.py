"""Elementary functions of a number, as expressions that LLVM turns into vector code: csrc/math.inc for Numba.

Every function is + - * / fma, comparisons that select, and operations on the bits: no branch, no table, no libm. Unlike
those of csrc/math.inc they take any argument, since a user's function may: infinities and NaN give what NumPy gives,
but for results below the normal numbers, which are 0. Largest errors in units in the last place are in
tests/test_custom_maths.py, which measures them.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
from llvmlite import ir as llvm
from numba.core import types
from numba.extending import intrinsic

from .compiler import jit, overloaded
from .duals import DualType, binary, dual, is_dual, is_number, slope_of, value_of
from .rebind import rebind
from .rules import SLOPES, SOURCES

# ---- operations that Python lacks ------------------------------------------------------------------------------------


def _llvm(name: str, n: int) -> Any:
    """The LLVM intrinsic `name` of n floats of one type."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = args[0].type
        return builder.call(
            builder.module.declare_intrinsic(name, [number], llvm.FunctionType(number, n * [number])), args
        )

    if n == 1:
        return intrinsic(lambda typingctx, a: (a(a), generate))
    if n == 2:
        return intrinsic(lambda typingctx, a, b: (a(a, a), generate))
    return intrinsic(lambda typingctx, a, b, c: (a(a, a, a), generate))


fma, fabs, copysign = _llvm("llvm.fma", 3), _llvm("llvm.fabs", 1), _llvm("llvm.copysign", 2)
pow_ = _llvm("llvm.pow", 2)


def _layout(dtype: Any) -> tuple[Any, int]:
    """The integer type of a float's size, and the bits of its fraction."""
    return (llvm.IntType(32), 23) if dtype == types.float32 else (llvm.IntType(64), 52)


@intrinsic
def power_of_two(typingctx: Any, shifted: Any) -> Any:
    """2^n, from n + 1.5 * 2^fraction + bias: the low bits become the exponent."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer, fraction = _layout(signature.return_type)
        bits = builder.bitcast(args[0], integer)
        return builder.bitcast(builder.shl(bits, integer(fraction)), args[0].type)

    return shifted(shifted), generate


@intrinsic
def exponent_and_fraction(typingctx: Any, x: Any) -> Any:
    """(k, m) with x = 2^k m and sqrt(1/2) <= m < sqrt(2), for normal x > 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer, fraction = _layout(x)
        bits = builder.bitcast(args[0], integer)
        root = 0x3F3504F3 if fraction == 23 else 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2)
        high = builder.and_(builder.sub(bits, integer(root)), integer(-1 << fraction))
        k = builder.sitofp(builder.ashr(high, integer(fraction)), args[0].type)
        m = builder.bitcast(builder.sub(bits, high), args[0].type)
        return context.make_tuple(builder, signature.return_type, (k, m))

    return types.UniTuple(x, 2)(x), generate


# ---- functions of a float --------------------------------------------------------------------------------------------


def _horner(coefficients: tuple[float, ...], dtype: Any) -> Any:
    """The polynomial with these coefficients, the highest power first."""
    cs = tuple(dtype(c) for c in coefficients)
    lines = [f"q = c{0}", *(f"q = fma(q, x, c{i})" for i in range(1, len(cs)))]
    source = "def polynomial(x):\n    " + "\n    ".join(lines) + "\n    return q\n"
    namespace: dict[str, Any] = {"fma": fma} | {f"c{i}": c for i, c in enumerate(cs)}
    exec(source, namespace)  # written out, since Numba's loops over constants are loops
    return jit(namespace["polynomial"])


def _atanh_series(n: int) -> tuple[float, ...]:
    """2 atanh(s) = 2s + s^3 (2/3 + 2/5 s^2 + ...): n terms of the bracket, in s^2."""
    return tuple(2 / (2 * k + 3) for k in reversed(range(n)))


def _erf_series(n: int) -> tuple[float, ...]:
    """erf(x) = x (c_0 + c_1 x^2 + ...)."""
    return tuple(2 / math.sqrt(math.pi) * (-1) ** k / (math.factorial(k) * (2 * k + 1)) for k in reversed(range(n)))


def _functions(T: Any) -> dict[str, Any]:
    """All of them, for one dtype."""
    single = T is np.float32
    fraction, bias = (23, 127) if single else (52, 1023)
    magic = T(1.5 * 2**fraction + bias)
    top, low, high = T(bias), T(-bias), T(bias + 1.5)  # of the exponent
    log2e = T(1.44269504 if single else 1.4426950408889634)
    ln2_high = T(0.693145751953125 if single else 0.6931471803691238)
    ln2_low = T(1.42860682031e-6 if single else 1.9082149292705878e-10)
    ln2, log10_e = T(0.6931471805599453), T(0.4342944819032518)
    zero, half, one, two, inf = T(0), T(0.5), T(1), T(2), T(np.inf)
    smallest, root2 = T(np.finfo(T).tiny), T(math.sqrt(2))
    far = T(11) if single else T(28)  # erfc is 0 from there on
    lowest, highest = (T(-88), T(89.5)) if single else (T(-709.4), T(710.5))
    # expm1(r) = r + r^2 q(r) on |r| <= ln 2 / 2, and the tail of the normal distribution: those of csrc/math.inc
    exp_q = _horner(
        (1.394677e-03, 8.366609e-03, 4.1666277e-02, 1.6666543e-01, 0.5)
        if single
        else (
            2.5114429823042423e-08, 2.762638215644154e-07, 2.7557228082642847e-06, 2.4801504311996252e-05,
            0.00019841269902893822, 0.0013888888932484613, 0.008333333333314654, 0.04166666666657332,
            0.16666666666666685, 0.5000000000000006,
        ),
        T,
    )  # fmt: skip
    tail_p = _horner(
        (4.016305e-03, 3.995896e-02, 1.8123354e-01, 4.3559e-01, 0.5)
        if single
        else (
            2.230191927977686e-07, 6.945375254491248e-06, 0.00010617689557785344, 0.0010364612001597805,
            0.007104294760571873, 0.035591697476265796, 0.13182267047199986, 0.3568894216479929, 0.6790191974558947,
            0.8275471119752196, 0.5,
        ),
        T,
    )  # fmt: skip
    tail_q = _horner(
        (1.006724e-02, 1.00169666e-01, 4.641866e-01, 1.1941841, 1.6690649, 1.0)
        if single
        else (
            5.590262144521342e-07, 1.7409473990861428e-05, 0.0002667050347791533, 0.00261543242408056,
            0.01807285406500304, 0.09177835953775078, 0.347711550021167, 0.9787824625754467, 1.9994813546354029,
            2.8152322952434186, 2.4529787847533044, 1.0,
        ),
        T,
    )  # fmt: skip
    log_r = _horner(_atanh_series(5 if single else 11), T)
    erf_near = _horner(_erf_series(9 if single else 17), T)

    @jit
    def power_parts(n):
        """2^n as a product of two, since n may be above the largest exponent."""
        rest = n - top if n > top else zero
        return power_of_two((n - rest) + magic), power_of_two(rest + magic)

    @jit
    def exp_parts(x, rest):
        """(p, s, f) with exp(x - rest) = f s (1 + p), powers of two: f is 1, or what s has no room for."""
        x = lowest if x < lowest else x
        x = highest if x > highest else x
        n = fma(x, log2e, magic) - magic
        r = fma(n, -ln2_high, x) - rest
        r = fma(n, -ln2_low, r)
        s, f = power_parts(n)
        return fma(r * r, exp_q(r), r), s, f

    @jit
    def exp(x):
        p, s, f = exp_parts(x, zero)
        return fma(s, p, s) * f

    @jit
    def exp2(x):
        x = low if x < low else x
        x = high if x > high else x
        n = (x + magic) - magic
        r = (x - n) * ln2
        s, f = power_parts(n)
        return fma(s, fma(r * r, exp_q(r), r), s) * f

    @jit
    def expm1(x):
        p, s, f = exp_parts(x, zero)
        return fma(s, p, s - (one if f == one else zero)) * f

    @jit
    def log_parts(x):
        """(k ln 2, log m)."""
        k, m = exponent_and_fraction(x)
        f = m - one
        s = f / (two + f)
        w = s * s
        return k, fma(w * s, log_r(w), two * s)

    @jit
    def log_ends(x, y):
        """The logarithm: y for normal x, and what it is elsewhere."""
        y = x if x == inf else y
        y = -inf if x < smallest else y
        return y if x >= -smallest else x - x if x != x else inf - inf

    @jit
    def log(x):
        k, y = log_parts(x)
        return log_ends(x, fma(k, ln2_high, fma(k, ln2_low, y)))

    @jit
    def log1p(x):
        u = one + x
        k, y = log_parts(u)
        lost = (x - (u - one)) if x < one else (one - (u - x))
        y = fma(k, ln2_high, fma(k, ln2_low, y + lost / u))
        return log_ends(u, x if fabs(x) < smallest else y)

    @jit
    def tanh(x):
        p, s, _ = exp_parts(-two * fabs(x), zero)
        return copysign(fma(-s, p, one - s) / fma(s, p, one + s), x)

    @jit
    def cosh(x):
        p, s, f = exp_parts(fabs(x), zero)
        e = fma(s, p, s)
        return fma(half, e, half / (e * f) / f) * f

    @jit
    def sinh(x):
        p, s, f = exp_parts(fabs(x), zero)
        e = fma(s, p, s - (one if f == one else zero))
        return copysign(half * (e + e / (e + one) if f == one else e) * f, x)

    @jit
    def erfc(x):
        size = fabs(x)
        size = far if size > far else size
        square = -size * size  # with what its rounding lost, which the exponential would magnify
        p, s, _ = exp_parts(square, fma(size, size, square))
        tail = two * fma(s, p, s) * tail_p(root2 * size) / tail_q(root2 * size)
        near = one - x * erf_near(x * x)
        return near if size < half else (tail if x > zero else two - tail)

    @jit
    def erf(x):
        return x * erf_near(x * x) if fabs(x) < half else copysign(one - erfc(fabs(x)), x)

    @jit
    def logaddexp(x, y):
        larger = x if x > y or x != x else y
        return larger + log1p(exp(-fabs(x - y)))

    return {
        "exp": exp,
        "exp2": exp2,
        "expm1": expm1,
        "log": log,
        "log1p": log1p,
        "tanh": tanh,
        "cosh": cosh,
        "sinh": sinh,
        "erf": erf,
        "erfc": erfc,
        "log2": jit(lambda x: log(x) * log2e),
        "log10": jit(lambda x: log(x) * log10_e),
        "sqrt": jit(lambda x: np.sqrt(x)),
        "square": jit(lambda x: x * x),
        "reciprocal": jit(lambda x: one / x),
        "abs": jit(lambda x: fabs(x)),
        "sign": jit(lambda x: one if x > zero else -one if x < zero else x),
        "logaddexp": logaddexp,
    }


_BY_TYPE = {types.float32: _functions(np.float32), types.float64: _functions(np.float64)}
_PLAIN = ("sin", "cos", "tan", "arctan", "arcsinh")  # by libm, a number at a time


# ---- the functions that stand for NumPy's --------------------------------------------------------------------------


def _stub(name: str) -> Any:
    """A name that Numba looks up by the types of its arguments, below."""

    def function(*numbers: Any) -> Any:
        raise NotImplementedError(f"{name} is for compiled code")

    function.__name__ = name
    return function


FUNCTIONS: dict[str, Any] = {name: _stub(name) for name in SOURCES}


def _float(x: Any) -> Any:
    """The type that a function of x has: integers and truth values become float64."""
    return x if isinstance(x, types.Float) else types.float64


def _widest(x: Any, y: Any) -> Any:
    """The type that a function of x and y has."""
    floats = [t for t in (x, y) if isinstance(t, types.Float)]
    return max(floats, key=lambda t: t.bitwidth) if floats else types.float64


def _one_number(name: str) -> None:
    """`name` of a float, of a dual number, of an integer."""
    stub = FUNCTIONS[name]
    plain = next(source for source in SOURCES[name] if source is not None)
    slope = rebind(SLOPES[name], FUNCTIONS, jit)
    cast = types.float64

    def typer(x: Any) -> Any:
        if isinstance(x, DualType):

            def differentiated(x):
                a = value_of(x)
                y = stub(a)
                return dual(y, slope(a, y) * slope_of(x))

            return differentiated
        if x in _BY_TYPE and name not in _PLAIN:
            function = _BY_TYPE[x][name]
            return lambda x: function(x)
        if isinstance(x, types.Float):
            return lambda x: plain(x)
        if isinstance(x, (types.Integer, types.Boolean)):
            return lambda x: stub(cast(x))
        return None

    overloaded(stub)(typer)


for _name in SLOPES:
    _one_number(_name)


def _chosen(stub: Any, choose: Any) -> None:
    """`stub` of two numbers or more: the first two's choice, then that and the next."""

    def typer(x: Any, y: Any, *others: Any) -> Any:
        if not is_number(x, y, *others):
            return None
        return (lambda x, y, *others: stub(choose(x, y), *others)) if others else lambda x, y, *others: choose(x, y)

    choose = jit(choose)
    overloaded(stub)(typer)


_maximum, _minimum = FUNCTIONS["maximum"], FUNCTIONS["minimum"]
_chosen(_maximum, lambda x, y: x if x > y or x != x else y)
_chosen(_minimum, lambda x, y: x if x < y or x != x else y)


@overloaded(FUNCTIONS["where"])
def _where(condition: Any, x: Any, y: Any) -> Any:
    return (lambda condition, x, y: x if condition else y) if is_number(x, y) else None


_as_it_is = jit(lambda x, bound: x)


@overloaded(FUNCTIONS["clip"])
def _clip(x: Any, a_min: Any = None, a_max: Any = None) -> Any:
    none = (None, types.none, types.Omitted(None))
    low, high = _as_it_is if a_min in none else _maximum, _as_it_is if a_max in none else _minimum
    return lambda x, a_min=None, a_max=None: high(low(x, a_min), a_max)


_power, _log = FUNCTIONS["power"], FUNCTIONS["log"]


def _raised(a, da, b, db):
    value = _power(a, b)
    return value, (b * _power(a, b - 1) * da if b != 0 else 0.0) + value * _log(a) * db


def _raised_left(a, da, b):
    return _power(a, b), b * _power(a, b - 1) * da if b != 0 else 0.0  # a^0 is 1 for a = 0 too


def _raised_right(a, b, db):
    value = _power(a, b)
    return value, value * _log(a) * db


_raised_dual = binary(_raised, _raised_left, _raised_right)
for _operator in (operator.pow, operator.ipow):  # where a function calls it by this name
    overloaded(_operator)(_raised_dual)


@jit
def _product(x, n):
    """The power of x for whole n: a loop only where n isn't known when this is compiled."""
    left, square, product = abs(n), x, 1.0
    while left > 0:
        if left & 1:
            product *= square
        square *= square
        left >>= 1
    return 1.0 / product if n < 0 else product


@overloaded(_power)
def _any_power(x: Any, y: Any) -> Any:
    """What ``**`` is too: Numba's own raises an exception for 0 to a negative power."""
    if is_dual(x, y):
        return _raised_dual(x, y)
    if not all(isinstance(t, (types.Float, types.Integer, types.Boolean)) for t in (x, y)):
        return lambda x, y: operator.pow(x, y)
    if isinstance(y, types.Float):
        cast = _widest(x, y)
        return lambda x, y: pow_(cast(x), cast(y))
    cast, whole = _float(x), types.int64
    return lambda x, y: _product(cast(x), whole(y))


_logaddexp = FUNCTIONS["logaddexp"]
_exp = FUNCTIONS["exp"]


def _added(a, da, b, db):
    value = _logaddexp(a, b)
    return value, da * _exp(a - value) + db * _exp(b - value)


def _added_left(a, da, b):
    value = _logaddexp(a, b)
    return value, da * _exp(a - value)


def _added_right(a, b, db):
    value = _logaddexp(a, b)
    return value, db * _exp(b - value)


_added_dual = binary(_added, _added_left, _added_right)


@overloaded(FUNCTIONS["logaddexp"])
def _log_add_exp(x: Any, y: Any) -> Any:
    if is_dual(x, y):
        return _added_dual(x, y)
    cast = _widest(x, y)
    function = _BY_TYPE[cast]["logaddexp"]
    return lambda x, y: function(cast(x), cast(y))
