"""Forward-mode differentiation in Python: a function run on dual numbers, value and slope.

``(a, a') * (b, b') = (a b, a b' + a' b)`` and so on; a comparison is one of values, so `if` works as always.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from .rebind import rebind
from .rules import SLOPES, SOURCES


class Dual:
    """A number and its slope."""

    __slots__ = ("slope", "value")

    def __init__(self, value: float, slope: float) -> None:
        self.value, self.slope = value, slope

    def __add__(self, other: Any) -> Dual:
        b, db = parts(other)
        return Dual(self.value + b, self.slope + db)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Dual:
        b, db = parts(other)
        return Dual(self.value - b, self.slope - db)

    def __rsub__(self, other: Any) -> Dual:
        return -self + other

    def __mul__(self, other: Any) -> Dual:
        b, db = parts(other)
        return Dual(self.value * b, self.value * db + self.slope * b)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Dual:
        return _quotient(self, other)

    def __rtruediv__(self, other: Any) -> Dual:
        return _quotient(other, self)

    def __pow__(self, other: Any) -> Dual:
        return _power(self, other)

    def __rpow__(self, other: Any) -> Dual:
        return _power(other, self)

    def __neg__(self) -> Dual:
        return Dual(-self.value, -self.slope)

    def __pos__(self) -> Dual:
        return self

    def __abs__(self) -> Dual:
        return -self if self.value < 0 else self

    def __bool__(self) -> bool:
        return bool(self.value)

    def __eq__(self, other: object) -> bool:
        return bool(self.value == parts(other)[0])

    def __lt__(self, other: Any) -> bool:
        return bool(self.value < parts(other)[0])

    def __le__(self, other: Any) -> bool:
        return bool(self.value <= parts(other)[0])

    def __gt__(self, other: Any) -> bool:
        return bool(self.value > parts(other)[0])

    def __ge__(self, other: Any) -> bool:
        return bool(self.value >= parts(other)[0])

    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # NumPy's scalars leave operators to the methods above


def parts(x: Any) -> tuple[Any, Any]:
    """The value and the slope of a dual number, or of a constant."""
    return (x.value, x.slope) if isinstance(x, Dual) else (x, 0.0)


def derivative(f: Callable[..., Any]) -> Callable[..., float]:
    """The derivative with respect to the first argument."""
    rebound = rebind(f, FUNCTIONS)

    def slope(x: float, *others: float) -> float:
        return float(parts(rebound(Dual(x, 1.0), *others))[1])

    return slope


def _quotient(x: Any, y: Any) -> Dual:
    (a, da), (b, db) = parts(x), parts(y)
    q = a / b
    return Dual(q, (da - q * db) / b)


def _power(x: Any, y: Any) -> Dual:
    (a, da), (b, db) = parts(x), parts(y)
    slope = b * a ** (b - 1) * da if isinstance(x, Dual) and b != 0 else 0.0  # a^0 is 1 for a = 0 too
    value = a**b
    return Dual(value, slope + value * np.log(a) * db if isinstance(y, Dual) else slope)


def _logaddexp(x: Any, y: Any) -> Dual:
    (a, da), (b, db) = parts(x), parts(y)
    value = np.logaddexp(a, b)
    return Dual(value, da * np.exp(a - value) + db * np.exp(b - value))


def _maximum(*numbers: Any) -> Any:
    return reduce(lambda x, y: x if x > y or x != x else y, numbers)


def _minimum(*numbers: Any) -> Any:
    return reduce(lambda x, y: x if x < y or x != x else y, numbers)


def _clip(x: Any, a_min: Any = None, a_max: Any = None) -> Any:
    x = x if a_min is None else _maximum(x, a_min)
    return x if a_max is None else _minimum(x, a_max)


_SEVERAL: dict[str, Callable[..., Any]] = {
    "maximum": _maximum,
    "minimum": _minimum,
    "power": operator.pow,
    "logaddexp": _logaddexp,
    "where": lambda condition, x, y: x if condition else y,
    "clip": _clip,
}


def _function(name: str) -> Callable[..., Any]:
    """The function called so in `rules.SOURCES`, of dual numbers too."""
    plain = next(source for source in SOURCES[name] if source is not None)

    def function(*numbers: Any, **named: Any) -> Any:
        if not any(isinstance(x, Dual) for x in (*numbers, *named.values())):
            return plain(*numbers, **named)
        if name in _SEVERAL:
            return _SEVERAL[name](*numbers, **named)
        (x,) = numbers
        value = plain(x.value)
        return Dual(value, SLOPES[name](x.value, value) * x.slope)

    return function


FUNCTIONS = {name: _function(name) for name in SOURCES}
