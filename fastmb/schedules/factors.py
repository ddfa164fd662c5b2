"""Schedules that multiply the learning rate by a factor of the step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._arithmetic import cospi, power, real_power
from .base import THIRD, FactorSchedule, check_steps


@dataclass(frozen=True)
class ConstantLR(FactorSchedule):
    """``lr * factor`` for `total_iters` steps, then `lr`.

    Parameters
    ----------
    lr : float
        The learning rate.
    factor : float, default 1/3
        In [0, 1].
    total_iters : int, default 5
        Steps with the factor.

    Examples
    --------
    >>> schedule = ConstantLR(0.4, factor=0.5, total_iters=2)
    >>> [schedule(step) for step in range(4)]
    [0.2, 0.2, 0.4, 0.4]
    """

    factor: float = THIRD
    total_iters: int = 5

    def _factors(self, steps: np.ndarray) -> np.ndarray:
        return np.where(steps < self.total_iters, self.factor, 1.0)


@dataclass(frozen=True)
class LinearLR(FactorSchedule):
    """From ``lr * start_factor`` in a line to ``lr * end_factor`` after `total_iters` steps, where it stays.

    Parameters
    ----------
    lr : float
        The learning rate.
    start_factor : float, default 1/3
        In (0, 1].
    end_factor : float, default 1
        In [0, 1].
    total_iters : int, default 5
        Steps from one to the other.

    Examples
    --------
    >>> schedule = LinearLR(0.4, start_factor=0.5, total_iters=2)
    >>> [round(schedule(step), 3) for step in range(4)]
    [0.2, 0.3, 0.4, 0.4]
    """

    start_factor: float = THIRD
    end_factor: float = 1.0
    total_iters: int = 5

    def _factors(self, steps: np.ndarray) -> np.ndarray:
        done = np.minimum(steps, self.total_iters) / self.total_iters
        return self.start_factor * (1 - done) + self.end_factor * done


@dataclass(frozen=True)
class StepLR(FactorSchedule):
    """Multiplied by `gamma` every `step_size` steps.

    Parameters
    ----------
    lr : float
        The learning rate to begin with.
    step_size : int
        Steps with the same rate.
    gamma : float, default 0.1
        The factor from one to the next.

    Examples
    --------
    >>> [StepLR(0.5, step_size=2, gamma=0.5)(step) for step in range(5)]
    [0.5, 0.5, 0.25, 0.25, 0.125]
    """

    step_size: int
    gamma: float = 0.1

    def _factors(self, steps: np.ndarray) -> np.ndarray:
        return power(self.gamma, steps // self.step_size)


@dataclass(frozen=True)
class MultiStepLR(FactorSchedule):
    """Multiplied by `gamma` at each of the `milestones`.

    Parameters
    ----------
    lr : float
        The learning rate to begin with.
    milestones : sequence of int
        Steps from which on the factor holds, in any order; one that is there twice counts twice.
    gamma : float, default 0.1
        The factor.

    Examples
    --------
    >>> [MultiStepLR(0.5, milestones=[1, 3], gamma=0.5)(step) for step in range(5)]
    [0.5, 0.25, 0.25, 0.125, 0.125]
    """

    milestones: tuple[int, ...]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "milestones", tuple(sorted(check_steps("milestones", self.milestones))))

    def _factors(self, steps: np.ndarray) -> np.ndarray:
        return power(self.gamma, np.searchsorted(np.array(self.milestones, np.int64), steps, side="right"))


@dataclass(frozen=True)
class ExponentialLR(FactorSchedule):
    """Multiplied by `gamma` at every step.

    Parameters
    ----------
    lr : float
        The learning rate to begin with.
    gamma : float
        The factor from a step to the next.

    Examples
    --------
    >>> [ExponentialLR(0.5, gamma=0.5)(step) for step in range(3)]
    [0.5, 0.25, 0.125]
    """

    gamma: float

    def _factors(self, steps: np.ndarray) -> np.ndarray:
        return power(self.gamma, steps)


@dataclass(frozen=True)
class PolynomialLR(FactorSchedule):
    """``lr * (1 - step / total_iters) ** power``, and 0 from `total_iters` on.

    Parameters
    ----------
    lr : float
        The learning rate to begin with.
    total_iters : int, default 5
        Steps down to 0.
    power : float, default 1
        Of the polynomial, at least 0.

    Examples
    --------
    >>> [PolynomialLR(0.5, total_iters=2)(step) for step in range(4)]
    [0.5, 0.25, 0.0, 0.0]
    """

    total_iters: int = 5
    power: float = 1.0

    def _factors(self, steps: np.ndarray) -> np.ndarray:
        return real_power(1.0 - np.minimum(steps, self.total_iters) / self.total_iters, self.power)


@dataclass(frozen=True)
class CosineAnnealingLR(FactorSchedule):
    """Half a cosine from `lr` to `eta_min` in `T_max` steps, then back again, and so on.

    ``eta_min + (lr - eta_min) (1 + cos(pi step / T_max)) / 2`` (Loshchilov and Hutter 2017).

    Parameters
    ----------
    lr : float
        The learning rate to begin with.
    T_max : int
        Steps down to `eta_min`.
    eta_min : float, default 0
        The least rate.

    Examples
    --------
    >>> [round(CosineAnnealingLR(0.5, T_max=2)(step), 3) for step in range(5)]
    [0.5, 0.25, 0.0, 0.25, 0.5]
    """

    T_max: int
    eta_min: float = 0.0

    def _rates(self, steps: np.ndarray) -> np.ndarray:
        return self.eta_min + (self.lr - self.eta_min) * self._factors(steps)

    def _factors(self, steps: np.ndarray) -> np.ndarray:
        return (1 + cospi(steps / self.T_max)) / 2
