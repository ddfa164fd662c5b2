"""Optimisers that need whole matrices: one mini-batch at a time, its gradient first, then the update.

Another executor makes the mean gradient, with all that `fastmb.executors.Rules` asks for, by an update that stores it
and leaves the parameters alone. What follows is `Optimizer.update`, in Python, parameter by parameter.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .. import threads
from .._progress import undisturbed
from ..optim.base import COLUMNS, Optimizer
from ..plan import views
from . import Training, load

if TYPE_CHECKING:
    from ..data import Batches
    from ..nn import Sequential

_FOREVER = 1e9  # seconds


@dataclass(frozen=True, repr=False)
class _Gradient(Optimizer):
    """The update that makes the gradient the state."""

    @property
    def kind(self) -> str:
        return "gradient"

    @property
    def n_states(self) -> int:
        return 1


class StepwiseExecutor:
    """See `fastmb.executors.Executor`: all but `run` and `apply` is done by the executor called `name`."""

    def __init__(self, name: str, net: Sequential, training: Training, n_threads: int | None) -> None:
        plan, params = net.plan, net.flat
        self.params, self.training, self.n_threads = params, training, n_threads
        stored = np.zeros((1, plan.size), plan.dtype)
        inner = replace(training, optimizer=_Gradient(), state=stored, average=None)
        self.made = 0
        self._inner = load(name)(plan, params, inner, n_threads, buffers=net.flat_buffers)
        self.gradients = self._inner.gradients
        self.per_example, self.forward, self.evaluate = (
            self._inner.per_example,
            self._inner.forward,
            self._inner.evaluate,
        )
        self._nothing = np.zeros((1, COLUMNS))
        parameters, gradients, places = (views(a, plan) for a in (params, stored[0], np.arange(plan.size)))
        groups, state = training.optimizer.parameter_groups(parameters), training.state
        self._parts = []  # of each parameter: name, group, itself, its gradient, its states (n_states, *shape)
        for name_, w in parameters.items():
            first = places[name_].flat[0]
            states = state[:, first : first + w.size].reshape(len(state), *w.shape)
            self._parts.append((name_, groups[name_], w, gradients[name_], states))

    @undisturbed()
    def run(
        self,
        batches: Batches,
        first: int,
        t: int,
        coefficients: np.ndarray,
        sums: np.ndarray,
        seconds: float,
        stats: np.ndarray | None = None,
        norms: np.ndarray | None = None,
    ) -> int:
        deadline = time.perf_counter() + seconds
        for step, row in enumerate(coefficients):
            here = slice(step, step + 1)
            of_this = None if stats is None else stats[here]
            if not self._inner.run(
                batches, first + step, t + step, self._nothing, sums[here], _FOREVER, of_this, norms
            ):
                return step
            self._update(row)
            if time.perf_counter() >= deadline:
                return step + 1
        return len(coefficients)

    @undisturbed()
    def apply(self, gradient: np.ndarray, weight: float, t: int, coefficients: np.ndarray) -> None:
        self._inner.apply(gradient, weight, t, self._nothing)
        self._update(coefficients[0])

    def accumulate(
        self,
        batches: Batches,
        t: int,
        row: int,
        out: np.ndarray,
        sums: np.ndarray,
        inputs: np.ndarray | None = None,
    ) -> bool:
        made = self._inner.made
        try:
            return self._inner.accumulate(batches, t, row, out, sums, inputs)
        finally:
            self.made += self._inner.made - made

    def _update(self, row: np.ndarray) -> None:
        optimizer, average = self.training.optimizer, self.training.average
        with threads.at_most(self.n_threads), np.errstate(all="ignore"):  # weights may overflow: the caller looks
            for name, group, w, gradient, states in self._parts:
                optimizer.update(name, optimizer.of_group(row, group), w, gradient, states)
            if average is not None and row[-1] != 0:
                average += self.params.dtype.type(row[-1]) * (self.params - average)
        self.made += 1
