"""Schedules made of schedules: one after another, several at once, warmed up."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from .._checks import number
from .base import THIRD, FactorSchedule, Schedule, check_steps
from .factors import LinearLR


@dataclass(frozen=True)
class SequentialLR(Schedule):
    """One schedule after another; each begins with its own step 0.

    Parameters
    ----------
    schedulers : sequence of Schedule
        At least one. Each has its own `lr`.
    milestones : sequence of int
        The steps at which the second, third, ... begin, each larger than the one before.

    Examples
    --------
    >>> from fastmb.schedules import ConstantLR, ExponentialLR
    >>> schedule = SequentialLR([ConstantLR(0.5, factor=0.1, total_iters=2), ExponentialLR(0.5, gamma=0.5)], [2])
    >>> [schedule(step) for step in range(5)]
    [0.05, 0.05, 0.5, 0.25, 0.125]
    """

    schedulers: tuple[Schedule, ...]
    milestones: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedulers", _schedules(self.schedulers))
        object.__setattr__(self, "milestones", check_steps("milestones", self.milestones))
        if len(self.milestones) != len(self.schedulers) - 1:
            raise ValueError(
                f"milestones must have one entry less than the {len(self.schedulers)} schedulers; "
                f"got {len(self.milestones)}"
            )
        for schedule, (begin, end) in zip(self.schedulers, pairwise((0, *self.milestones)), strict=False):
            if end <= begin:
                raise ValueError(f"milestones must rise from 1 on; got {self.milestones}")
            if schedule.end is not None and schedule.end < end - begin:
                raise ValueError(
                    f"{type(schedule).__name__} ends after {schedule.end} steps; until the next of the schedulers "
                    f"begins there are {end - begin}"
                )

    @property
    def end(self) -> int | None:
        last = self.schedulers[-1].end
        return None if last is None else last + (0, *self.milestones)[-1]

    def _rates(self, steps: np.ndarray) -> np.ndarray:
        rates = np.empty(len(steps))
        begins = (0, *self.milestones)
        which = np.searchsorted(begins, steps, side="right") - 1
        for i, schedule in enumerate(self.schedulers):
            mine = which == i
            rates[mine] = schedule._rates(steps[mine] - begins[i])
        return rates


@dataclass(frozen=True)
class ChainedScheduler(FactorSchedule):
    """Several schedules at once: `lr` times the factors of all.

    Parameters
    ----------
    schedulers : sequence of FactorSchedule
        At least one, all with the same `lr`: those that multiply it by a factor of the step, which are all but cycles,
        sequences and a cosine with an `eta_min`.

    Attributes
    ----------
    lr : float
        The one of the schedulers.

    Examples
    --------
    >>> from fastmb.schedules import ConstantLR, ExponentialLR
    >>> schedule = ChainedScheduler([ConstantLR(0.5, factor=0.5, total_iters=2), ExponentialLR(0.5, gamma=0.5)])
    >>> [schedule(step) for step in range(4)]
    [0.25, 0.125, 0.125, 0.0625]
    """

    lr: float = field(init=False)
    schedulers: tuple[FactorSchedule, ...]

    def __post_init__(self) -> None:
        schedulers = _schedules(self.schedulers)
        for i, schedule in enumerate(schedulers):
            if not isinstance(schedule, FactorSchedule) or getattr(schedule, "eta_min", 0.0) != 0:
                raise ValueError(
                    f"schedulers[{i}], {schedule!r}, can't be chained: its rate is no multiple of lr (WarmUp takes it)"
                )
        rates = {schedule.lr for schedule in schedulers if isinstance(schedule, FactorSchedule)}
        if len(rates) > 1:
            raise ValueError(f"schedulers must have the same lr; got {sorted(rates)}")
        object.__setattr__(self, "schedulers", schedulers)
        object.__setattr__(self, "lr", rates.pop())

    def _factors(self, steps: np.ndarray) -> np.ndarray:
        factors = self.schedulers[0]._factors(steps)
        for schedule in self.schedulers[1:]:
            factors = factors * schedule._factors(steps)
        return factors


@dataclass(frozen=True)
class WarmUp(Schedule):
    """A schedule, times a factor that rises in a line from `start_factor` to 1.

    What torch does by a `ChainedScheduler` with a `LinearLR`, for schedules of any kind (Goyal et al. 2017).

    Parameters
    ----------
    scheduler : Schedule or float
        What is warmed up to: it begins at step 0 too. A number is a rate that stays.
    start_factor : float, default 1/3
        In (0, 1].
    total_iters : int, default 5
        Steps until the factor is 1.

    Examples
    --------
    >>> from fastmb.schedules import CosineAnnealingLR
    >>> schedule = WarmUp(CosineAnnealingLR(0.5, T_max=100), start_factor=0.25, total_iters=4)
    >>> [round(schedule(step), 3) for step in range(6)]
    [0.125, 0.219, 0.312, 0.405, 0.498, 0.497]
    """

    scheduler: Schedule | float
    start_factor: float = THIRD
    total_iters: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.scheduler, Schedule):
            object.__setattr__(self, "scheduler", number("scheduler", self.scheduler, "[0, inf)"))

    @property
    def end(self) -> int | None:
        return self.scheduler.end if isinstance(self.scheduler, Schedule) else None

    def _rates(self, steps: np.ndarray) -> np.ndarray:
        warm = LinearLR(1.0, self.start_factor, 1.0, self.total_iters)._rates(steps)
        return warm * (self.scheduler._rates(steps) if isinstance(self.scheduler, Schedule) else self.scheduler)


def _schedules(schedulers: object) -> tuple[Schedule, ...]:
    found = tuple(schedulers) if isinstance(schedulers, list | tuple) else ()
    if not found or not all(isinstance(schedule, Schedule) for schedule in found):
        raise TypeError(f"schedulers must be a sequence of at least one schedule; got {schedulers!r}")
    return found
