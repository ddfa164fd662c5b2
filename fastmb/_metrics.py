"""What a task is judged by besides its loss, gathered chunk by chunk so that no set is ever held whole."""

from __future__ import annotations

import numpy as np

from ._gradient_stats import NORMS


class Accuracy:
    """The weighted share of rows (or, with several labels a row, of labels) that are predicted right."""

    name = "accuracy"

    def __init__(self) -> None:
        self._hits = self._weight = 0.0

    def add(self, out: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        """Raw outputs (n, C), targets as `fastmb.data.check_y` returns them, weights (n,)."""
        self._hits += float(self._right(out, y) @ weight)
        self._weight += float(weight.sum())

    def _right(self, out: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (out.argmax(axis=1) == (y if y.ndim == 1 else y.argmax(axis=1))).astype(np.float64)

    def result(self) -> float:
        return self._hits / self._weight


class LabelAccuracy(Accuracy):
    """Accuracy where a row has several labels, each right or wrong by itself; an output above 0 says yes."""

    def _right(self, out: np.ndarray, y: np.ndarray) -> np.ndarray:
        return ((out > 0) == (y > 0.5)).mean(axis=1)


class R2:
    """The coefficient of determination, 1 - sum w (y - z)^2 / sum w (y - mean y)^2, averaged over the outputs.

    As in scikit-learn, an output whose target is constant, in the rows that have weight, counts 1 if it is met exactly,
    else 0. Means and sums of squares of chunks are put together by the formula of Chan, Golub and LeVeque (1983).
    """

    name = "r2"

    def __init__(self) -> None:
        self._weight = 0.0
        self._mean = self._total = self._residual = np.float64(0)
        self._least, self._most = np.float64(np.inf), np.float64(-np.inf)  # of a target: sums of squares are rounded

    def add(self, out: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        """Raw outputs (n, C), targets (n, C), weights (n,)."""
        added = float(weight.sum())
        if not added:
            return
        y = y.astype(np.float64)
        mean = weight @ y / added
        apart = mean - self._mean
        total = self._weight + added
        self._residual = self._residual + weight @ (y - out) ** 2
        self._total = self._total + weight @ (y - mean) ** 2 + apart**2 * (self._weight * added / total)
        self._mean = self._mean + apart * (added / total)
        self._weight = total
        counted = y if weight.all() else y[weight > 0]
        self._least = np.minimum(self._least, counted.min(axis=0))
        self._most = np.maximum(self._most, counted.max(axis=0))

    def result(self) -> float:
        constant = (self._least == self._most) | (self._total == 0)  # or so near that squares are 0
        with np.errstate(divide="ignore", invalid="ignore"):
            r2 = 1 - self._residual / self._total
        return float(np.where(constant, self._residual == 0, r2).mean())


BY_TASK: dict[str, type[Accuracy] | type[R2]] = {
    "classification": Accuracy,
    "multilabel": LabelAccuracy,
    "regression": R2,
}


def falls(name: str) -> bool:
    """Whether a column of the history is to fall: losses, norms and the variance of gradients; metrics are to rise.

    So are noise scales: they do as the gradient that is left gets small, and tell when larger mini-batches pay.
    """
    return name.endswith("loss") or name in NORMS
