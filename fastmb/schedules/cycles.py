"""Schedules that go up and down between rates: with restarts, over and over, or once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .._arithmetic import cospi, power
from .._checks import number
from .base import Schedule


@dataclass(frozen=True)
class CosineAnnealingWarmRestarts(Schedule):
    """Half a cosine from `lr` to `eta_min`, then again from `lr`, each time `T_mult` times as long.

    SGDR, of Loshchilov and Hutter (2017).

    Parameters
    ----------
    lr : float
        The learning rate at the start of a cycle.
    T_0 : int
        Steps of the first cycle.
    T_mult : int, default 1
        What a cycle's length is multiplied by for the next.
    eta_min : float, default 0
        The least rate.

    Examples
    --------
    >>> schedule = CosineAnnealingWarmRestarts(0.5, T_0=1, T_mult=2)
    >>> [round(schedule(step), 3) for step in range(4)]
    [0.5, 0.5, 0.25, 0.5]
    """

    lr: float
    T_0: int
    T_mult: int = 1
    eta_min: float = 0.0

    def _rates(self, steps: np.ndarray) -> np.ndarray:
        if self.T_mult == 1:
            done = steps % self.T_0 / self.T_0
        else:
            last, starts, lengths = int(steps.max(initial=0)), [0], [self.T_0]
            while starts[-1] + lengths[-1] <= last:
                starts.append(starts[-1] + lengths[-1])
                lengths.append(lengths[-1] * self.T_mult)
            cycle = np.searchsorted(starts, steps, side="right") - 1
            done = (steps - np.array(starts)[cycle]) / np.array(lengths, np.float64)[cycle]
        return self.eta_min + (self.lr - self.eta_min) * (1 + cospi(done)) / 2


@dataclass(frozen=True)
class CyclicLR(Schedule):
    """Up from `base_lr` to `max_lr` in a line and down again, over and over (Smith 2017).

    The momentum goes the other way with ``SGD(lr=cycle, momentum=cycle.momentum())``.

    Parameters
    ----------
    base_lr, max_lr : float
        The rates between which it goes.
    step_size_up : int, default 2000
        Steps up.
    step_size_down : int, optional
        Steps down; as many as up by default.
    mode : {"triangular", "triangular2", "exp_range"}, default "triangular"
        Every cycle the same; each half as high as the last; ``gamma ** step`` times as high.
    gamma : float, default 1
        For ``"exp_range"``.

    Examples
    --------
    >>> [CyclicLR(0.25, 0.75, step_size_up=2)(step) for step in range(6)]
    [0.25, 0.5, 0.75, 0.5, 0.25, 0.5]
    """

    base_lr: float
    max_lr: float
    step_size_up: int = 2000
    step_size_down: int | None = None
    mode: str = "triangular"
    gamma: float = 1.0

    def momentum(self, base_momentum: float = 0.8, max_momentum: float = 0.9) -> CyclicLR:
        """The momentum that belongs to it: from `max_momentum` down to `base_momentum` while the rate goes up."""
        return replace(self, base_lr=max_momentum, max_lr=base_momentum)

    def _rates(self, steps: np.ndarray) -> np.ndarray:
        up = self.step_size_up
        down = up if self.step_size_down is None else self.step_size_down
        cycle, within = np.divmod(steps, up + down)
        height = np.where(within <= up, within / up, (up + down - within) / down)
        if self.mode == "triangular2":
            height *= power(0.5, cycle)
        elif self.mode == "exp_range":
            height *= power(self.gamma, steps)
        return self.base_lr + (self.max_lr - self.base_lr) * height


@dataclass(frozen=True)
class OneCycleLR(Schedule):
    """Up from ``max_lr / div_factor`` to `max_lr`, then far down: once (Smith and Topin 2019).

    The momentum goes the other way with ``SGD(lr=cycle, momentum=cycle.momentum())``, or, for Adam and the like,
    ``Adam(lr=cycle, betas=(cycle.momentum(), 0.999))``.

    Parameters
    ----------
    max_lr : float
        The largest rate.
    total_steps : int, optional
        Steps of the cycle. There are no rates after it: a fit that goes on for longer is refused.
    epochs, steps_per_epoch : int, optional
        Their product, instead of `total_steps`.
    pct_start : float, default 0.3
        The share of steps that go up.
    anneal_strategy : {"cos", "linear"}, default "cos"
        Half a cosine up and down, or lines.
    div_factor : float, default 25
        `max_lr` over the first rate.
    final_div_factor : float, default 1e4
        The first rate over the last.
    three_phase : bool, default False
        Down to the first rate in as many steps as up, then to the last, instead of down in one go.

    Examples
    --------
    >>> [OneCycleLR(1.0, total_steps=5, pct_start=0.6, div_factor=4)(step) for step in range(3)]
    [0.25, 0.625, 1.0]
    """

    max_lr: float
    total_steps: int | None = None
    epochs: int | None = None
    steps_per_epoch: int | None = None
    pct_start: float = 0.3
    anneal_strategy: str = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_steps is None and (self.epochs is None or self.steps_per_epoch is None):
            raise ValueError("OneCycleLR takes total_steps, or epochs and steps_per_epoch")

    @property
    def end(self) -> int:
        if self.total_steps is not None:
            return self.total_steps
        assert self.epochs is not None
        assert self.steps_per_epoch is not None
        return self.epochs * self.steps_per_epoch

    def momentum(self, base_momentum: float = 0.85, max_momentum: float = 0.95) -> OneCycleLR:
        """The momentum that belongs to it: from `max_momentum` to `base_momentum` while the rate goes up, and back."""
        high = number("max_momentum", max_momentum, "(0, 1)")
        low = number("base_momentum", base_momentum, "(0, 1)")
        return replace(self, max_lr=low, div_factor=low / high, final_div_factor=1.0)

    def _rates(self, steps: np.ndarray) -> np.ndarray:
        first = self.max_lr / self.div_factor
        last = first / self.final_div_factor
        up = self.pct_start * self.end
        ends, rates = [0.0, up - 1, self.end - 1.0], [first, self.max_lr, last]
        if self.three_phase:
            ends[2:2], rates[2:2] = [2 * up - 2], [first]
        phase = np.searchsorted(ends[1:-1], steps)
        start, stop = np.array(ends[:-1])[phase], np.array(ends[1:])[phase]
        before, after = np.array(rates[:-1])[phase], np.array(rates[1:])[phase]
        done = np.where(stop > start, np.clip((steps - start) / (stop - start), 0, 1), 1.0)
        if self.anneal_strategy == "cos":
            return after + (before - after) / 2 * (1 + cospi(done))
        return before + (after - before) * done
