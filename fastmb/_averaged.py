"""The part of a `Trainer` that looks ahead and back: what the next updates are made with, and the weights' average."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import executors
from .data import Batches, check_X
from .losses import FromOutside
from .optim import SGD

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

    _since = 0  # epochs that were complete when the learning rate was assigned: one that reacts begins there

    if TYPE_CHECKING:
        net: Sequential
        optimizer: Optimizer
        average: Average | None
        t: int
        epoch: int
        state: np.ndarray
        history: History
        batch_size: int
        drop_last: bool
        seed: int
        n_threads: int | None
        executor: str
        input_scale: float
        _current: Epoch | None
        _lock: threading.RLock
        _weights: np.ndarray | None  # as trained, while the network has their average
        _ahead: tuple[Optimizer, int, int, np.ndarray, np.ndarray] | None  # coefficients of updates, and of which
        _standing: tuple[int, Any] | None  # rows of the history, and what follows from them for the learning rate

        def _check_rows(self, rows: int, batch_size: int, drop_last: bool = False) -> None: ...

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
        """The learning rate that follows from the epochs that are complete since it was assigned."""
        schedule: Any = self.optimizer.lr
        self._since = min(self._since, self.epoch)  # a divergence may have taken epochs back
        done, standing = self._standing or (0, schedule.start())
        rows = self.history._rows
        while done < len(rows) and rows[done]["epoch"] <= self.epoch:
            if rows[done]["epoch"] > self._since and schedule.monitor in rows[done]:
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

        Before anything was averaged they are those of the network. When it is left, the network has its own again, and
        so it has running statistics, which `update_bn` may have made those of the average.

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
            self._weights, buffers = self.net.flat.copy(), self.net.flat_buffers.copy()
            try:
                self.net.flat[:] = average
                yield self.net
            finally:
                self.net.flat[:], self.net.flat_buffers[:] = self._weights, buffers
                self._weights = None

    def averaged_net(self) -> Sequential:
        """A new network, with the averaged weights; before anything was averaged, with those of `net`.

        Its running statistics are those that `net` has: `update_bn` tells how it gets its own.

        Raises
        ------
        ValueError
            If the trainer keeps no average.
        """
        with self._lock:
            average, net = self._averaged_flat(), copy.deepcopy(self.net)
            net.flat[:] = average
            return net

    def update_bn(self, X: Any) -> None:
        """Take the running statistics of `BatchNorm1d` anew, of the network as it is now, with the rows of `X`.

        As `torch.optim.swa_utils.update_bn`: they become the means over the mini-batches of `X`, `batch_size` rows each
        in their order, whatever the layers' momentum. Rows go through the network as in training, with the dropout of
        the next update; the weights stay. A network without `BatchNorm1d` stays as it is.

        Averaged weights need it: no mini-batch has gone through them, and the statistics beside them are of the weights
        that were trained.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Rows to take statistics of, finite: the training data, or some thousand of them.

        Raises
        ------
        ValueError
            If `X` doesn't fit, or a mini-batch would have 1 row.
        FloatingPointError
            If statistics or outputs are NaN or infinite; nothing is changed then.

        Examples
        --------
        >>> import fastmb as mb
        >>> X, y = mb.datasets.load_digits()
        >>> net = mb.Sequential(mb.Linear(64, 32), mb.BatchNorm1d(32), mb.ReLU(), mb.Linear(32, 10))
        >>> trainer = mb.Trainer(net, optimizer=mb.SGD(0.1), input_scale=1 / 16, average=mb.SWA(2))
        >>> history = trainer.fit(X[:1500], y[:1500], max_epochs=6, verbose=0)
        >>> with trainer.averaged():
        ...     trainer.update_bn(X[:1500])
        ...     accuracy = trainer.evaluate(X[1500:], y[1500:])["accuracy"]
        ...     net = trainer.averaged_net()  # to keep
        """
        with self._lock:
            plan, size = self.net.plan, self.batch_size
            X = check_X(X, plan.n_features, dtype=plan.dtype)
            if not plan.batch_norms:
                return
            drop_last = self.drop_last and len(X) >= size
            self._check_rows(len(X), size, drop_last)
            plan = replace(plan, stages=tuple(replace(stage, momentum=None) for stage in plan.stages))
            found, unused = np.zeros_like(self.net.flat_buffers), np.zeros_like(self.net.flat)
            training = executors.Training(FromOutside(), SGD(), np.zeros((0, plan.size), plan.dtype), size, self.seed)
            executor = executors.load(self.executor)(plan, self.net.flat, training, self.n_threads, buffers=found)
            nothing, finite = np.broadcast_to(np.zeros(1, plan.dtype), (len(X), plan.n_outputs)), True
            for start in range(0, len(X) - drop_last * (len(X) % size), size):
                rows = slice(start, start + size)
                batches = Batches(X[rows], nothing[rows], None, None, size, self.input_scale)
                finite = finite and executor.accumulate(batches, self.t, start, unused, np.zeros((1, 2)))
            if not (finite and np.isfinite(found).all()):
                raise FloatingPointError("outputs or statistics of X are not finite; nothing was changed")
            self.net.flat_buffers[:] = found

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
        epoch = self.epoch + 1
        if self.average is not None and not self.average.each_update:
            count = self.average.count(self.t, epoch)
            divide = self.net.dtype.type(max(count, 1))
            if count == 1:
                self.state[-1] = self.net.flat
            elif count:
                self.state[-1] += (self.net.flat - self.state[-1]) / divide
        self.epoch, self._current = epoch, None  # nothing is called after the average has changed
