"""What all schedules have: the checks of their parameters, and their rates one at a time or many at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from .._checks import boolean, integer, number
from .._errors import unknown_name

THIRD = 1 / 3
_MOST = 2**53  # steps that a parameter may count, and at which there are rates
_NUMBERS = {  # the intervals of parameters that are numbers, which have one meaning in all schedules
    "lr": "[0, inf)",
    "base_lr": "[0, inf)",
    "max_lr": "[0, inf)",
    "eta_min": "[0, inf)",
    "factor": "[0, 1]",
    "start_factor": "(0, 1]",
    "end_factor": "[0, 1]",
    "gamma": "[0, inf)",
    "power": "[0, 1000]",
    "pct_start": "[0, 1]",
    "div_factor": "(0, inf)",
    "final_div_factor": "(0, inf)",
}
_INTEGERS = {"total_iters", "step_size", "T_max", "T_0", "T_mult", "step_size_up", "step_size_down"}
_INTEGERS |= {"total_steps", "epochs", "steps_per_epoch"}
_NAMES = {"mode": ("triangular", "triangular2", "exp_range"), "anneal_strategy": ("cos", "linear")}


@dataclass(frozen=True)
class Schedule:
    """What all schedules have."""

    def __post_init__(self) -> None:
        for parameter in fields(self):
            name, value = parameter.name, getattr(self, parameter.name)
            if name in _NUMBERS:
                value = number(name, value, _NUMBERS[name])
            elif name in _INTEGERS and (value is not None or parameter.default is not None):
                value = integer(name, value, 1, _MOST)
            elif isinstance(parameter.default, bool):
                value = boolean(name, value)
            elif name in _NAMES and value not in _NAMES[name]:
                raise unknown_name(name, value, _NAMES[name])
            object.__setattr__(self, name, value)

    @property
    def end(self) -> int | None:
        """The number of steps that it has rates for; None for any number."""
        return None

    def __call__(self, step: int) -> float:
        """The learning rate after `step` updates."""
        step = integer("step", step, 0, _MOST)
        self._check_end(step)
        return _block(self, step >> 10)[step & 1023]

    def rates(self, start: int, n: int) -> np.ndarray:
        """The learning rates of steps `start`, ..., `start` + n - 1, float64 ``(n,)``: the bits of `n` calls."""
        start, n = integer("start", start, 0, _MOST), integer("n", n, 0)
        self._check_end(start + n - 1)
        return _evaluated(self, start, n)

    def _check_end(self, step: int) -> None:
        if self.end is not None and step >= self.end:
            raise ValueError(f"{type(self).__name__} ends after {self.end} steps; there is no rate for step {step}")

    def _rates(self, steps: np.ndarray) -> np.ndarray:
        """The rates of int64 `steps`, element by element; those past the end may be anything."""
        raise NotImplementedError


@dataclass(frozen=True)
class FactorSchedule(Schedule):
    """A schedule that multiplies `lr` by a factor of the step, so that several can be chained."""

    lr: float

    def _rates(self, steps: np.ndarray) -> np.ndarray:
        return self.lr * self._factors(steps)

    def _factors(self, steps: np.ndarray) -> np.ndarray:
        raise NotImplementedError


@lru_cache(maxsize=64)
def _block(schedule: Schedule, block: int) -> list[float]:
    """The rates of steps 1024 block .. 1024 block + 1023, ready for steps that come one at a time."""
    rates: list[float] = _evaluated(schedule, block << 10, 1024).tolist()
    return rates


def _evaluated(schedule: Schedule, start: int, n: int) -> np.ndarray:
    """The rates of `n` steps; those that are too large for a number are infinite or NaN, which optimisers refuse."""
    with np.errstate(all="ignore"):
        return schedule._rates(np.arange(start, start + n))


def check_steps(argument: str, steps: Any) -> tuple[int, ...]:
    """`steps`, a sequence of integers >= 0, as a tuple."""
    try:
        values = tuple(steps)
    except TypeError:
        raise TypeError(f"{argument} must be a sequence of integers; got {steps!r}") from None
    return tuple(integer(f"{argument}[{i}]", value, 0, _MOST) for i, value in enumerate(values))
