"""The part of a `Trainer` that looks ahead and back: what the next updates are made with, and the weights' average."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import threading

    from ._fitting import Epoch
    from .averaging import Average
    from .history import History
    from .nn import Sequential
    from .optim import Optimizer

_AHEAD = 1024  # updates


class Averaged:
    """Coefficients of the next updates; the network with its averaged weights."""

    if TYPE_CHECKING:
        net: Sequential
        optimizer: Optimizer
        average: Average | None
        t: int
        epoch: int
        state: np.ndarray
        history: History
        _current: Epoch | None
        _lock: threading.RLock
        _weights: np.ndarray | None  # as trained, while the network has their average
        _ahead: tuple[Optimizer, int, int, np.ndarray, np.ndarray] | None  # coefficients of updates, and of which
        _standing: tuple[int, Any] | None  # rows of the history, and what follows from them for the learning rate

    def _coefficients(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The learning rates of the next `n` updates, ``(n,)``, and what `Executor.run` takes of them, ``(n, C)``."""
        t = self.t
        if self.average is None and self.optimizer.constant:
            return self._ahead_of(t, n)
        rates = np.full(n, self._reacted()) if self.optimizer.reacts else self.optimizer.learning_rates(t, n)
        if self.average is None:
            return rates, self.optimizer.coefficients(t, n, rates)
        rates = self.average.learning_rates(rates, self.epoch)
        rows = self.optimizer.coefficients(t, n, rates)
        return rates, np.column_stack([rows, self.average.weights(t, n)]) if self.average.each_update else rows

    def _ahead_of(self, t: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The same where nothing but the updates' number makes a difference: many are made together, which takes calls
        of `step` and short epochs less time.
        """
        if self._ahead is None or self._ahead[0] is not self.optimizer or not self._ahead[1] <= t <= self._ahead[2] - n:
            many = max(n, _AHEAD)
            rates = self.optimizer.learning_rates(t, many)
            self._ahead = self.optimizer, t, t + many, rates, self.optimizer.coefficients(t, many, rates)
        _, begin, _, rates, rows = self._ahead
        these = slice(t - begin, t - begin + n)
        return rates[these], rows[these]

    def _reacted(self) -> float:
        """The learning rate that follows from the epochs that are complete."""
        schedule: Any = self.optimizer.lr
        done, standing = self._standing or (0, schedule.start())
        rows = self.history._rows
        while done < len(rows) and rows[done]["epoch"] <= self.epoch:
            if schedule.monitor in rows[done]:
                standing = schedule.after(standing, rows[done][schedule.monitor])
            done += 1
        self._standing = done, standing
        return standing.lr

    def _check_own_weights(self) -> None:
        if self._weights is not None:
            raise RuntimeError("the network has its averaged weights: leave `with trainer.averaged()` first")

    @contextmanager
    def averaged(self) -> Iterator[Sequential]:
        """The network with the averaged weights for a while: ``with trainer.averaged(): trainer.evaluate(X, y)``.

        Before anything was averaged they are those of the network. When it is left, the network has its own again.

        Raises
        ------
        ValueError
            If the trainer keeps no average.
        """
        with self._lock:
            average = self._averaged_flat()
            if self._weights is not None:
                yield self.net
                return
            self._weights = self.net.flat.copy()
            try:
                self.net.flat[:] = average
                yield self.net
            finally:
                self.net.flat[:] = self._weights
                self._weights = None

    def averaged_net(self) -> Sequential:
        """A new network, with the averaged weights; before anything was averaged, with those of `net`.

        Raises
        ------
        ValueError
            If the trainer keeps no average.
        """
        with self._lock:
            average, net = self._averaged_flat(), copy.deepcopy(self.net)
            net.flat[:] = average
            return net

    def _averaged_flat(self) -> np.ndarray:
        if self.average is None:
            raise ValueError("this trainer keeps no average; Trainer(..., average=EMA(0.999)) does")
        flat: np.ndarray = self.state[-1] if self.average.count(self.t, self.epoch) else self.net.flat
        return flat

    def _validated_flat(self) -> np.ndarray:
        """The weights that a fit's validation is of."""
        return self._averaged_flat() if getattr(self.average, "validate", False) else self.net.flat

    def _epoch_done(self) -> None:
        """Count an epoch; an average over epochs takes its weights in."""
        self.epoch, self._current = self.epoch + 1, None
        if self.average is not None and not self.average.each_update:
            count = self.average.count(self.t, self.epoch)
            if count == 1:
                self.state[-1] = self.net.flat
            elif count:
                self.state[-1] += (self.net.flat - self.state[-1]) / self.net.dtype.type(count)
