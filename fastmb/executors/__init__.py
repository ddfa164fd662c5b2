"""How a plan runs.

Three executors give the same answer: `native` (C kernels, Cython loops, OpenMP threads) is the product, `numba` is the
alternative that needs no compiler, `numpy` is the reference, float64 and plain. Each is a class with the methods of
`Executor`; nothing outside this package knows which one it talks to.

An executor is built once for a plan and keeps what it needs between calls. It does not own the parameters or the
optimiser's state: it is given the arrays and changes them in place. It checks nothing: `fastmb.data` and
`fastmb.trainer` have done so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .._errors import missing_extra, unknown_name

if TYPE_CHECKING:
    from ..data import Batches
    from ..losses import Loss
    from ..nn import Sequential
    from ..optim import Optimizer
    from ..plan import Plan

NAMES = ("native", "numba", "numpy")


@dataclass(frozen=True)
class Rules:
    """What a gradient goes through between the rows and the update, in this order.

    Each row's own gradient is shortened to the norm `clip_per_example`; the sum over the mini-batch is divided by
    `divide` (0: by the sum of the rows' weights); to each of its numbers a normal number is added, of deviation
    ``noise_multiplier * clip_per_example`` before the division, drawn from (seed, t), or from the operating system
    where `secure`; the whole is multiplied by ``max_grad_norm / (norm + 1e-6)`` where that is below 1; and each number
    is cut to ``-clip_value .. clip_value``.
    """

    part_rows: int = 0  # rows of a mini-batch that are in memory at a time; 0 for all
    clip_per_example: float = math.inf
    noise_multiplier: float = 0.0
    secure: bool = False
    max_grad_norm: float = math.inf
    clip_value: float = math.inf
    divide: float = 0.0

    @cached_property
    def stored(self) -> bool:
        """Whether the gradient as a whole has to be there before the update."""
        limits = min(self.max_grad_norm, self.clip_value)
        return self.part_rows > 0 or self.noise_multiplier > 0 or limits < math.inf or self.divide > 0


@dataclass
class Training:
    """What an executor needs besides the plan in order to train: the objective, and where the update goes."""

    loss: Loss
    optimizer: Optimizer
    state: np.ndarray  # (optimizer.n_states, plan.size) of the plan's dtype; all zero before the first step
    batch_size: int
    seed: int
    rules: Rules = Rules()
    average: np.ndarray | None = None  # (plan.size,): a running average of the parameters, if one is kept


class Executor(Protocol):
    """What an executor does.

    `made` counts what its calls have done, ever: updates by `run` and `apply`, sums that `accumulate` has added to. A
    signal's handler may raise as soon as a call is over, and its result is lost then. This tells it all the same.
    """

    @property
    def made(self) -> int: ...

    def __init__(
        self,
        plan: Plan,
        params: np.ndarray,
        training: Training | None,
        n_threads: int | None,
        *,
        buffers: np.ndarray | None = None,
    ) -> None:
        """`params` is the flat vector, (plan.size,) of the plan's dtype, read and written in place.

        `buffers`, (plan.buffer_size,), likewise: `run` and `accumulate` move running statistics, `gradients` and
        `per_example` do not. A plan without buffers needs none. Without a `Training` rows are taken as in inference.
        """

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
        """Train on mini-batches `first`, `first` + 1, ... and return how many updates were made.

        `t` updates were made before this call, ever; it seeds dropout. Row j of `coefficients`, (steps, C) float64, is
        ``optimizer.coefficients(...)`` of mini-batch `first` + j: as many rows, so many mini-batches. Where an average
        of the parameters is kept, there is one column more, its weight: after the update,
        ``average += weight * (parameters - average)``. Row j of `sums`, (steps, 2) float64, receives the mini-batch's
        weighted loss sum and the sum of its weights (their quotient is its mean loss). Both are contiguous. Stops
        early, after an update, when `seconds` are over; and before an update, when the mini-batch's loss is not
        finite: `sums` holds the loss, and the mini-batch isn't counted.

        Row j of `stats`, (steps, 5) float64, receives the sum and the maximum of the squared norms of the rows' own
        gradients, so scaled that their plain mean is the mini-batch's; the squared norm of that mean; the number of
        rows; the sum of the norms. `norms`, (rows of the set,) float32, receives the norm of each row that was met.
        """

    def gradients(self, batches: Batches, t: int, out: np.ndarray, sums: np.ndarray) -> bool:
        """The mean gradient of the first mini-batch into `out`, (plan.size,), without rules; `sums` (1, 2) as in `run`.

        Whether the loss was finite.
        """

    def accumulate(
        self,
        batches: Batches,
        t: int,
        row: int,
        out: np.ndarray,
        sums: np.ndarray,
        inputs: np.ndarray | None = None,
    ) -> bool:
        """Add the sum of the weighted gradients of the first mini-batch's rows, each clipped, to `out`, (plan.size,).

        With `row` 0, `out` is overwritten; else the mini-batch continues one that has had so many rows: `row` counts
        the rows of dropout. `inputs`, (rows, n_features), receives each row's gradient with respect to its input.
        Returns False, with nothing added, if the loss is not finite.
        """

    def apply(self, gradient: np.ndarray, weight: float, t: int, coefficients: np.ndarray) -> None:
        """The update by a sum of gradients over rows whose weights sum to `weight`; `gradient` is used up.

        `coefficients` is one row, as in `run`. `Rules.divide` is not looked at.
        """

    def per_example(
        self,
        batches: Batches,
        t: int,
        sums: np.ndarray,
        norms: np.ndarray | None = None,
        gradients: list[np.ndarray | None] | None = None,
        inputs: np.ndarray | None = None,
    ) -> bool:
        """What the rows of the first mini-batch have of their own, each into an array of the plan's dtype unless None.

        The norms of their weighted gradients, (rows,); the gradients, for each stage of the weight, (rows, n_in,
        n_out), and of the bias, (rows, n_out) or None; those with respect to the input, (rows, n_features). `sums`,
        (1, 2), as in `run`. Without a loss, in an executor that was made without a `Training`, y is the gradient of the
        outputs. Returns False if the loss is not finite.
        """

    def forward(self, X: np.ndarray, scale: float, out: np.ndarray) -> None:
        """The network's raw output, without dropout, for all rows of `X` into `out`, (n, n_outputs), C order."""

    def evaluate(self, batches: Batches, out: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> None:
        """Raw outputs of all rows, as `forward`, and each row's loss and weight, (n,) float64, without dropout.

        The mean loss is ``losses.sum() / weights.sum()``; sample and class weights are in both. Takes the rows in
        their own order (``batches.order`` is not looked at).
        """


def load(name: str) -> type[Executor]:
    """The executor class called `name`, imported when asked for."""
    if name == "native":
        if not available(name):
            raise ImportError("executor='native' needs the compiled extension, which this build of fastmb left out")
        from .native import NativeExecutor

        return NativeExecutor
    if name == "numba":
        if not available(name):
            raise missing_extra("numba", "numba", "executor='numba'")
        from .numba import NumbaExecutor

        return NumbaExecutor
    if name == "numpy":
        from .reference import NumpyExecutor

        return NumpyExecutor
    raise unknown_name("executor", name, NAMES)


def available(name: str) -> bool:
    """Whether an executor can be had here. One that is there but doesn't load is not hidden: `load` says so."""
    needs = {"native": f"{__name__}.native", "numba": "numba"}
    return name not in needs or find_spec(needs[name]) is not None


def default_name() -> str:
    """The first of `NAMES` that can be had: `native` unless it was left out, then `numba` if it is installed."""
    return next(name for name in NAMES if available(name))


def build(name: str, net: Sequential, training: Training, n_threads: int | None) -> Executor:
    """The executor called `name`, made ready for a training of `net`."""
    if not training.optimizer.fused:
        from .stepwise import StepwiseExecutor

        return StepwiseExecutor(name, net, training, n_threads)
    return load(name)(net.plan, net.flat, training, n_threads, buffers=net.flat_buffers)


def default() -> type[Executor]:
    """What a network predicts with."""
    return load(default_name())
