"""How a plan runs.

Three executors give the same answer: `native` (C kernels, Cython loops, OpenMP threads) is the product, `numba` is the
alternative that needs no compiler, `numpy` is the reference, float64 and plain. Each is a class with the methods of
`Executor`; nothing outside this package knows which one it talks to.

An executor is built once for a plan and keeps what it needs between calls. It does not own the parameters or the
optimiser's state: it is given the arrays and changes them in place. It checks nothing: `fastmb.data` and
`fastmb.trainer` have done so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .._errors import unknown_name

if TYPE_CHECKING:
    from ..data import Batches
    from ..losses import Loss
    from ..optim import Optimizer
    from ..plan import Plan

NAMES = ("native", "numpy")


@dataclass
class Training:
    """What an executor needs besides the plan in order to train: the objective, and where the update goes."""

    loss: Loss
    optimizer: Optimizer
    state: np.ndarray  # (optimizer.n_states, plan.size) of the plan's dtype; all zero before the first step
    batch_size: int
    seed: int


class Executor(Protocol):
    """What an executor does."""

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

        `buffers`, (plan.buffer_size,), likewise: an update changes running statistics, `gradients` does not. A plan
        without buffers needs none.
        """

    def run(
        self, batches: Batches, first: int, t: int, coefficients: np.ndarray, sums: np.ndarray, seconds: float
    ) -> int:
        """Train on mini-batches `first`, `first` + 1, ... and return how many updates were made.

        `t` updates were made before this call, ever; it seeds dropout. Row j of `coefficients`, (steps, C) float64,
        is ``optimizer.coefficients(...)`` of mini-batch `first` + j: as many rows, so many mini-batches. Row j of
        `sums`, (steps, 2) float64, receives the mini-batch's weighted loss sum and the sum of its weights (their
        quotient is its mean loss). Stops early, after an update, when `seconds` are over; and before an update, when
        the mini-batch's loss is not finite: `sums` holds the loss, and the mini-batch isn't counted.
        """

    def gradients(self, batches: Batches, t: int, out: np.ndarray, sums: np.ndarray) -> None:
        """The mean gradient of the first mini-batch into `out`, (plan.size,); `sums`, (2,), as in `run`."""

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
        from .native import NativeExecutor

        return NativeExecutor
    if name == "numpy":
        from .reference import NumpyExecutor

        return NumpyExecutor
    raise unknown_name("executor", name, NAMES)


def default() -> type[Executor]:
    """What a network predicts with: `native`, or the reference where the extension was not built."""
    try:
        return load("native")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.native":
            raise
        return load("numpy")
