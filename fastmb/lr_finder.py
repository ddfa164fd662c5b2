"""The learning-rate finder: a learning-rate range test (Smith 2017), on a copy of a trainer.

The copy is trained with a learning rate that grows geometrically from mini-batch to mini-batch, until the loss has
grown far above its lowest, or the last rate is reached. Where the loss fell fastest is a good rate to train with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import integer, number
from ._errors import missing_extra
from ._progress import Whole
from ._trial import check_trainer, standing, trial
from .callbacks import Callback

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .trainer import Trainer

_SKIPPED = 10  # rates whose losses are no ground to suggest one of them


@dataclass(frozen=True, eq=False)
class LRFinder:
    """What `find_lr` found: the loss of one mini-batch for each learning rate.

    Parameters
    ----------
    lrs, losses : ndarray of shape (n,), float64
        The learning rates, growing, and the mean loss of each one's mini-batch before its update.
    smoothing : float
        beta of the moving average, in [0, 1).

    Attributes
    ----------
    smoothed : ndarray of shape (n,), float64
        The average of the losses around each, of the one k rates away with the weight ``beta ** k``. Losses above twice
        the mean of the first ten count as that, so that a divergence at the end doesn't reach far back.
    suggestion : float or None
        Of the rates up to the one with the lowest smoothed loss, but the first ten, the one where the smoothed loss
        falls most steeply over log(lr); None if it falls nowhere.
    """

    lrs: np.ndarray
    losses: np.ndarray
    smoothing: float = 0.9

    @cached_property
    def smoothed(self) -> np.ndarray:
        losses = np.minimum(self.losses, 2 * self.losses[:_SKIPPED].mean())
        return _both_ways(losses, self.smoothing) / _both_ways(np.ones(len(losses)), self.smoothing)

    @cached_property
    def suggestion(self) -> float | None:
        kept = slice(_SKIPPED, int(self.smoothed.argmin()) + 1)
        if len(self.lrs[kept]) < 2:
            return None
        slopes = np.gradient(self.smoothed[kept], np.log(self.lrs[kept]))
        steepest = int(slopes.argmin())
        return float(self.lrs[kept][steepest]) if slopes[steepest] < 0 else None

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the losses against the learning rate, and mark the suggestion.

        Needs Matplotlib: ``pip install 'fastmb[plot]'``.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to; a new figure by default.

        Returns
        -------
        matplotlib.axes.Axes
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            raise missing_extra("matplotlib", "plot", "LRFinder.plot()") from None
        if ax is None:
            _, ax = plt.subplots()
        ax.plot(self.lrs, self.losses, color="C0", alpha=0.3, label="loss of a mini-batch")
        ax.plot(self.lrs, self.smoothed, color="C0", label="smoothed")
        if self.suggestion is not None:
            at = int(np.searchsorted(self.lrs, self.suggestion))
            label = f"suggestion: {self.suggestion:.2g}"
            ax.plot(self.lrs[at], self.smoothed[at], "o", color="C1", label=label)
        low, begin = self.losses.min(), self.losses[0]
        if low < begin:  # show how it fell; how far it rose doesn't matter
            ax.set_ylim(low - 0.1 * (begin - low), begin + 0.5 * (begin - low))
        ax.set_xscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
        ax.legend()
        return ax


def find_lr(
    trainer: Trainer,
    X: Any,
    y: Any,
    *,
    sample_weight: Any = None,
    start_lr: float = 1e-6,
    end_lr: float = 10.0,
    num_iter: int = 200,
    smoothing: float = 0.9,
    diverge_threshold: float = 4.0,
) -> LRFinder:
    """Try learning rates from small to large, one mini-batch each, on a copy of a trainer.

    The trainer and its network stay as they are; the copy begins with their weights and optimiser state. Its
    optimiser's own learning rate, or schedule, plays no part; schedules of what else has one, such as momentum and
    dropout, stay at their present value.

    Parameters
    ----------
    trainer : Trainer
        With the network, loss, optimiser and batch size to find a learning rate for.
    X, y, sample_weight
        As for `Trainer.fit`.
    start_lr, end_lr : float, default 1e-6 and 10
        The first rate and the last, which is larger.
    num_iter : int, default 200
        Rates to try. If `X` has fewer mini-batches, it is taken several times.
    smoothing : float, default 0.9
        How much of the moving average of the loss is kept from one mini-batch to the next, in [0, 1).
    diverge_threshold : float, default 4
        Stop when the smoothed loss is more than so many times its lowest.

    Returns
    -------
    LRFinder
        With `lrs`, `losses`, `suggestion` and `plot`.

    Raises
    ------
    TypeError, ValueError
        For parameters out of their range and for data that don't fit.
    FloatingPointError
        If the loss isn't finite from the first mini-batch on.
    KeyboardInterrupt
        At Ctrl-C.

    References
    ----------
    .. [1] L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017.

    Examples
    --------
    >>> import fastmb as mb
    >>> X, y = mb.datasets.load_digits()
    >>> trainer = mb.Trainer(mb.mlp([64, 32, 10]), optimizer=mb.SGD(momentum=0.9), input_scale=1 / 16)
    >>> found = mb.find_lr(trainer, X, y)
    >>> 0.001 < found.suggestion < 1
    True
    """
    check_trainer(trainer)
    start_lr, end_lr = number("start_lr", start_lr, "(0, inf)"), number("end_lr", end_lr, "(0, inf)")
    if end_lr <= start_lr:
        raise ValueError(f"end_lr must be larger than start_lr = {start_lr}; got {end_lr}")
    lrs = np.geomspace(start_lr, end_lr, integer("num_iter", num_iter, 2))
    smoothing = number("smoothing", smoothing, "[0, 1)")
    threshold = number("diverge_threshold", diverge_threshold, "(1, inf)")
    first, last = trainer.t, len(lrs) - 1
    recorder = _Recorder(first, lrs, smoothing, threshold)
    optimizer = standing(trainer, lambda t: float(lrs[min(t - first, last)]))
    tried = trial(trainer, optimizer, average=None)  # it might have learning rates of its own
    try:
        with Whole():
            tried.fit(X, y, sample_weight=sample_weight, max_epochs=len(lrs), verbose=0, callbacks=[recorder])
    except FloatingPointError:  # a rate too many
        if not recorder.found:
            raise
    rates, losses = np.array(recorder.found).reshape(-1, 2).T
    return LRFinder(rates, losses, smoothing)


class _Recorder(Callback):
    """Notes the losses, and ends the fit when all rates were tried or the loss has grown too much."""

    def __init__(self, first: int, lrs: np.ndarray, smoothing: float, threshold: float) -> None:
        self.end, self.lrs = first + len(lrs), iter(lrs.tolist())
        self.smoothing, self.threshold = smoothing, threshold
        self.sum = self.weight = 0.0  # of the moving average
        self.lowest = math.inf
        self.found: list[tuple[float, float]] = []

    def on_batch_end(self, trainer: Trainer, loss: float) -> str | None:
        lr = next(self.lrs)
        if not math.isnan(loss):  # rows without weight
            self.found.append((lr, loss))
            self.sum, self.weight = self.smoothing * self.sum + loss, self.smoothing * self.weight + 1
            self.lowest = min(self.lowest, self.sum / self.weight)
            if self.sum / self.weight > self.threshold * self.lowest:
                return "diverged"
        return "found" if trainer.t == self.end else None


def _both_ways(values: np.ndarray, beta: float) -> np.ndarray:
    """Sums of all values, each weighted by beta to the power of how far away it is."""
    return _decaying(values, beta) + _decaying(values[::-1], beta)[::-1] - values


def _decaying(values: np.ndarray, beta: float) -> np.ndarray:
    """s_t = value_t + beta s_(t-1)"""
    return np.array([*accumulate(values.tolist(), lambda before, value: value + beta * before)])
