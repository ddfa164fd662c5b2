"""Checks of the numbers that people pass: the argument, what was expected, what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np


def number(argument: str, value: object, interval: str) -> float:
    """`value` as a float, if it is a real number in `interval`, such as ``"[0, 1)"``; infinities and NaN never are."""
    message = f"{argument} must be a number in {interval}; got {_shown(value)}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(message)
    low, high = map(float, interval[1:-1].split(","))
    try:
        number = float(value)
    except OverflowError:  # an integer or a fraction that no float comes near
        raise ValueError(message) from None
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below and math.isfinite(number)):
        raise ValueError(message)
    return number


def integer(argument: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int, if it is an integer from `low` to `high`, both included."""
    expected = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    message = f"{argument} must be {expected}; got {_shown(value)}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(message)
    try:
        integer = operator.index(value)
    except TypeError:  # an array of several values has an __index__ too
        raise TypeError(message) from None
    if integer < low or (high is not None and integer > high):
        raise ValueError(message)
    return integer


def boolean(argument: str, value: object) -> bool:
    """`value` as a bool, if it is one, Python's or NumPy's."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{argument} must be True or False; got {_shown(value)}")
    return bool(value)


def verbose(value: object) -> bool:
    """Whether there is something to say: 0 and False stand for nothing, larger integers and True for all there is."""
    return bool(value) if isinstance(value, (bool, np.bool_)) else integer("verbose", value, 0) > 0


def number_or_schedule(argument: str, value: object, interval: str) -> float | Callable[[int], float]:
    """`value` as a float in `interval`; a function of the step, such as a schedule, as it is."""
    if isinstance(value, type):
        came = f"the class {value.__name__}, no instance"
        raise TypeError(f"{argument} must be a number in {interval}, or a schedule; got {came}")
    return value if callable(value) else number(argument, value, interval)


def per_step(argument: str, value: float | Callable[[int], float], interval: str, start: int, n: int) -> np.ndarray:
    """The values of a number, a schedule or a function of the step at steps `start`, ..., float64 ``(n,)``, checked."""
    if not callable(value):
        return np.array([value], np.float64) if n == 1 else np.full(n, value, np.float64)
    if n > 1 and (many := getattr(value, "rates", None)):  # a schedule: all steps at once
        found = values = many(start, n)
    else:
        found = [value(step) for step in range(start, start + n)]
        values = np.array([each if isinstance(each, float) else _float_or_nan(each) for each in found])
    low, high = map(float, interval[1:-1].split(","))
    right = np.isfinite(values) & (values >= low) & ((values <= high) if interval[-1] == "]" else (values < high))
    if not right.all():
        wrong = int(right.argmin())
        got = found[wrong].item() if isinstance(found[wrong], np.generic) else found[wrong]
        error = ValueError if isinstance(got, Real) else TypeError
        raise error(f"{argument}({start + wrong}) must be a number in {interval}; got {_shown(got)}")
    return values


def _float_or_nan(value: Any) -> float:
    """`value` as a float: NaN if it isn't a number, or is one that no float comes near."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def seed(value: object) -> int:
    """A seed: any 64-bit unsigned integer."""
    return integer("seed", value, 0, 2**64 - 1)


def _shown(value: object) -> str:
    """`value` as it is written in Python; of an integer that would fill lines, or can't be written, the size."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)
