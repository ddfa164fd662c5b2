"""A user's own function of numbers, as an executor needs it: its values, its slope, and both compiled.

The function is plain Python of one number (an activation) or of two (a loss: output and target). `Function` checks it
once, by finite differences, and gives the reference executor its values; the compiled executors ask `Function.compiled`
for a callback that takes a whole block. Who passes no derivative gets it by forward-mode differentiation: the function
is run on dual numbers (value, slope), in Python (`dual.py`) and compiled (`duals.py`), by the same rules (`rules.py`).

The names that the function uses are looked up anew (`rebind.py`): `np.exp` and `math.exp` become one function, which
differentiates, and which the compiler knows as a polynomial that becomes vector code (`maths.py`), not a libm call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .dual import derivative
from .rebind import looked_up

if TYPE_CHECKING:
    from numba.core.ccallback import CFunc

# Where a gradient is checked: on both sides of 0, near and far, off the places where functions have their kinks.
POINTS = np.array([-7.37, -3.61, -2.17, -1.33, -0.713, -0.287, -0.0431, 0.0379, 0.311, 0.737, 1.41, 2.23, 3.59, 7.29])
TARGETS = (0.0, 1.0, 0.317, 2.71, -1.19)
TOLERANCE = 1e-5  # of the larger of 1, the slope and the value
_STEP = 1e-4


@dataclass(frozen=True)
class Function:
    """``f(x)`` or ``f(z, y)``, real, and its derivative with respect to the first argument.

    Parameters
    ----------
    f : callable
        Of `arity` numbers, giving a number.
    df : callable or None
        Of the same numbers, or of one more: the value of `f`. None: found by differentiating `f`.
    arity : {1, 2}
        1 for an activation, 2 for a loss.
    """

    f: Any
    df: Any
    arity: int

    def __post_init__(self) -> None:
        _count(self.f, "f", (self.arity,), _CALLS[self.arity])
        if self.df is not None:
            _count(self.df, "df", (self.arity, self.arity + 1), _CALLS[self.arity].replace("f(", "df("))
        self._check()

    @property
    def name(self) -> str:
        return getattr(self.f, "__name__", repr(self.f))

    @property
    def takes_value(self) -> bool:
        """Whether `df` takes the value of `f` as its last argument: it can't be called without."""
        return self.df is not None and not _accepts(self.df, self.arity)

    def value(self, *arrays: np.ndarray) -> np.ndarray:
        """f, element by element, float64."""
        return _each(self.f, *arrays)

    def slope(self, *arrays: np.ndarray, value: np.ndarray) -> np.ndarray:
        """f', element by element, float64; `value` is what `value` returned."""
        if self.df is None:
            return _each(derivative(self.f), *arrays)
        return _each(self.df, *arrays, *([value] if self.takes_value else []))

    def compiled(self, dtype: np.dtype) -> CFunc:
        """The callback for blocks of `dtype`. Compiles when first asked for, which takes about a second, and anew when
        names that the functions look up stand for something else.

        Raises
        ------
        ImportError
            Without numba: ``pip install 'fastmb[numba]'``.
        TypeError
            If numba can't compile the function; the message is numba's.
        """
        from .compiler import compiled

        return compiled(self, np.dtype(dtype).name, looked_up(self.f, self.df))

    def _check(self) -> None:
        """Raise a `ValueError` unless f is finite and f' is what finite differences say."""
        usable = 0
        trouble: ValueError | None = None
        for y in TARGETS if self.arity == 2 else (None,):
            x = POINTS if y is None else POINTS + y  # a loss of z - y has its kinks where z - y has
            others = () if y is None else (np.full_like(x, y),)
            values = self._called(self.value, "f", x, *others)
            bad = ~np.isfinite(values)
            if bad.any():
                at = _shown(x[bad][0], y)
                trouble = trouble or ValueError(f"f must be finite; f({at}) of {self.name} is {values[bad][0]}")
                continue  # a loss need not be defined for every target
            usable += 1
            slopes = self._called(lambda *a, v=values: self.slope(*a, value=v), "df", x, *others)
            self._compare(x, y, values, slopes)
        if not usable and trouble is not None:
            raise trouble

    def _called(self, method: Callable[..., np.ndarray], what: str, *arrays: np.ndarray) -> np.ndarray:
        try:
            return method(*arrays)
        except Exception as error:
            source = " (or differentiating it)" if self.df is None and what == "df" else ""
            what = "f" if self.df is None else what
            message = f"{what}{source} of {self.name} failed on a float: {error}"
            try:
                again: Exception = type(error)(message)
            except Exception:  # it is made of something else than a message
                again = RuntimeError(message)
            raise again from error

    def _compare(self, x: np.ndarray, y: float | None, values: np.ndarray, slopes: np.ndarray) -> None:
        others = () if y is None else (np.full_like(x, y),)
        h = _STEP * np.maximum(1, np.abs(x))
        left, right = ((self.value(x + side * h, *others) - values) / (side * h) for side in (-1, 1))
        near = [self.value(x + side * h / 2, *others) for side in (-1, 1)]
        centre = (4 * (near[1] - near[0]) / h - (left + right) / 2) / 3  # Richardson: the error is O(h^4)
        size = np.maximum(1, np.maximum(np.abs(centre), np.abs(values)))
        bent = np.abs(right - left) > 100 * h * size  # a kink nearby: one-sided slopes bound it
        low, high = np.minimum(left, right), np.maximum(left, right)
        off = np.where(bent, np.maximum(low - slopes, slopes - high), np.abs(slopes - centre))
        wrong = ~(off <= TOLERANCE * size)
        if wrong.any():
            found = "; ".join(
                f"at {_shown(x[i], y)} it is {slopes[i]:.6g}, finite differences give {centre[i]:.6g}"
                for i in np.flatnonzero(wrong)[:3]
            )
            what = "df" if self.df is not None else "the derivative found"
            raise ValueError(f"{what} is not the derivative of f ({self.name}): {found}")


_CALLS = {1: "f(x)", 2: "f(z, y)"}


def _shown(x: float, y: float | None) -> str:
    return f"x = {x:.6g}" if y is None else f"z = {x:.6g}, y = {y:.6g}"


def _accepts(f: Callable[..., Any], n: int) -> bool:
    try:
        inspect.signature(f).bind(*[0.0] * n)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature: called with what f takes
        return n < 2
    return True


def _count(f: object, argument: str, counts: tuple[int, ...], call: str) -> None:
    if not callable(f):
        raise TypeError(f"{argument} must be a function of numbers, called as {call}; got {f!r}")
    if not any(_accepts(f, n) for n in counts):
        numbers = " or ".join(map(str, counts))
        raise TypeError(f"{argument} must take {numbers} numbers, called as {call}; got {_signature(f)}")


def _signature(f: Callable[..., Any]) -> str:
    return f"{getattr(f, '__name__', f)!s}{inspect.signature(f)}"


def _each(f: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """Function values of the elements, one after the other."""
    out = np.empty(arrays[0].shape)
    flat = out.reshape(-1)
    with np.errstate(all="ignore"):
        for i, numbers in enumerate(zip(*(np.asarray(a, np.float64).reshape(-1) for a in arrays), strict=True)):
            try:
                result = f(*numbers)
            except (OverflowError, ZeroDivisionError):  # `math` raises where NumPy gives an infinity or NaN
                result = np.nan
            if (
                np.ndim(result)
                or not np.isrealobj(result)
                or not isinstance(result, (int, float, np.generic, np.ndarray))
            ):
                raise TypeError(f"it must return a real number; got {result!r}")
            flat[i] = result
    return out
