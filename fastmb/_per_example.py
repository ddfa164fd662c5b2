"""What a mini-batch really contains: a trainer's gradients before they become an update, whole and row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._extension import compiled
from .data import Batches, check_output_gradients, check_rows, check_X
from .losses import FromOutside
from .plan import views

if TYPE_CHECKING:
    import threading

    from .executors import Executor, Rules
    from .losses import Loss
    from .nn import Sequential
    from .optim import Optimizer


UNASKED = 1 << 26  # bytes up to which nobody looks whether they are there: that takes longer than to write 2 MB


@dataclass
class Pending:
    """Gradients that wait for `apply`: their sum over the rows, what it is to be divided by, and the rows."""

    flat: np.ndarray
    weight: float | None  # None where the gradients came from outside: nothing is divided
    rows: int


class PerExample:
    """The part of a `Trainer` that shows gradients, one by one or added up."""

    if TYPE_CHECKING:
        net: Sequential
        loss: Loss
        optimizer: Optimizer
        input_scale: float
        t: int
        state: np.ndarray
        batch_size: int
        seed: int
        n_threads: int | None
        executor: str
        _executor: Executor
        _lock: threading.RLock
        _pending: Pending | None

        @property
        def rules(self) -> Rules: ...

        def _check_rows(self, rows: int, batch_size: int, drop_last: bool = False) -> None: ...
        def _mini_batch(self, X: Any, y: Any, sample_weight: Any, zeros: bool = False) -> Batches: ...
        def _teach(self, y: Any = None) -> None: ...
        def _executor_for(self, loss: Loss) -> Executor: ...
        def _coefficients(self, n: int) -> tuple[np.ndarray, np.ndarray]: ...
        def _check_free(self, call: str) -> None: ...

    def gradients(self, X: Any, y: Any, sample_weight: Any = None) -> tuple[float, dict[str, np.ndarray]]:
        """The mean loss of one mini-batch, and its mean gradient by parameter name.

        Nothing is updated. Dropout is that of the next `step`; weight decay, clipping and noise are not in it.

        Raises
        ------
        FloatingPointError
            If the loss is NaN or infinite.
        """
        with self._lock:
            batches = self._mini_batch(X, y, sample_weight)
            self._check_rows(len(batches.X), len(batches.X))
            gradient, sums = np.zeros_like(self.net.flat), np.zeros((1, 2))
            if not self._executor.gradients(batches, self.t, gradient, sums):
                raise FloatingPointError(f"the loss is {sums[0, 0]}: there is no gradient")
            return _mean(sums), views(gradient, self.net.plan)

    def accumulate(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Add the gradients of some rows to those that wait for `apply`, and return the rows' mean loss.

        However the rows of a mini-batch are divided among calls, one row a call or all in one, `apply` makes the same
        update, but for rounding: gradients are summed over the rows and divided by the sum of their weights at the
        end. Rows of weight 0 count for nothing (a call with no others returns NaN). Not so with `BatchNorm1d`, which
        takes the statistics of each call's rows, more than one, and moves the running ones at each call. Parameters are
        as in `step`. A second call of `fit` or `step` leaves what waits as it is.

        Raises
        ------
        FloatingPointError
            If the loss is NaN or infinite; nothing is added then.
        ValueError
            If gradients from `backward` wait already; if there is one row, and `BatchNorm1d` needs more.

        Examples
        --------
        >>> import fastmb as mb
        >>> X, y = mb.datasets.load_digits()
        >>> one, other = (mb.Trainer(mb.mlp([64, 16, 10], dtype="float64"), optimizer=mb.SGD(lr=0.1)) for _ in range(2))
        >>> loss = one.step(X[:8], y[:8])
        >>> for i in range(8):
        ...     loss = other.accumulate(X[i : i + 1], y[i : i + 1])
        >>> other.apply()
        >>> float(abs(one.net.flat - other.net.flat).max()) < 1e-15
        True
        """
        with self._lock:
            if self._pending is not None and self._pending.weight is None:
                raise ValueError("gradients from backward() wait for apply(): call it before accumulate()")
            batches = self._mini_batch(X, y, sample_weight, zeros=True)
            self._check_rows(len(batches.X), len(batches.X))
            pending = self._pending or Pending(np.zeros_like(self.net.flat), 0.0, 0)
            rows, weight, sums = pending.rows + len(batches.X), pending.weight or 0.0, np.zeros((1, 2))
            executor = self._executor
            made = executor.made
            try:
                executor.accumulate(batches, self.t, pending.rows, pending.flat, sums)
            finally:
                if executor.made > made:
                    pending.weight, pending.rows, self._pending = weight + sums[0, 1], rows, pending
            if executor.made == made:
                raise FloatingPointError(f"the loss is {sums[0, 0]}; nothing was added")
            self._teach(y)
            return _mean(sums)

    def apply(self) -> None:
        """Make one update by the gradients that `accumulate` or `backward` has added up.

        Those of `accumulate` are divided by the sum of their rows' weights, so that they are a mean; those of
        `backward` are taken as they are. Noise and limits, if the trainer has them, are applied as in `step`.

        Raises
        ------
        ValueError
            If nothing waits.
        """
        with self._lock:
            self._check_free("apply()")
            if self._pending is None:
                raise ValueError("no gradients wait: call accumulate() or backward() first")
            weight = 1.0 if self._pending.weight is None else self._pending.weight
            if self.rules.divide:  # mini-batches by chance: their expected size
                weight = self.rules.divide
            _, coefficients = self._coefficients(1)
            executor = self._executor
            made = executor.made
            try:
                executor.apply(self._pending.flat, weight, self.t, coefficients)
            finally:
                if executor.made > made:
                    self._pending, self.t = None, self.t + 1

    def backward(self, X: Any, output_gradients: Any) -> np.ndarray:
        """Take gradients with respect to the raw outputs back to the parameters, where they wait for `apply`.

        For who owns the loss: policy gradients, physics, another network on top. Gradients of the parameters are summed
        over the rows, ``sum_i J_i' g_i``, and over calls, as `torch.Tensor.backward` does; `apply` divides them by
        nothing. Dropout is that of the next update. `BatchNorm1d` takes the statistics of each call's rows, and moves
        the running ones: g is that of outputs in training then, which ``net(X)`` doesn't return.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
        output_gradients : array-like of shape (n, n_outputs), or (n,) for one output
            g: the loss differentiated by the network's raw outputs (before a `Softmax` at the end).

        Returns
        -------
        ndarray of shape (n, n_features)
            The loss differentiated by `X`, of the network's dtype.

        Raises
        ------
        ValueError
            If gradients from `accumulate` wait already, or if the arrays don't fit or aren't finite.
        """
        with self._lock:
            if self._pending is not None and self._pending.weight is not None:
                raise ValueError("gradients from accumulate() wait for apply(): call it before backward()")
            batches = self._outside(X, output_gradients)
            self._check_rows(len(batches.X), len(batches.X))
            pending = self._pending or Pending(np.zeros_like(self.net.flat), None, 0)
            rows, sums = pending.rows + len(batches.X), np.zeros((1, 2))
            inputs = np.empty((len(batches.X), self.net.plan.n_features), self.net.dtype)
            executor = self._outside_executor()
            try:
                executor.accumulate(batches, self.t, pending.rows, pending.flat, sums, inputs)
            finally:
                if executor.made:
                    pending.rows, self._pending = rows, pending
            if not executor.made:
                raise FloatingPointError("the outputs times output_gradients are not finite; nothing was added")
            self._teach()
            return inputs

    def zero_grad(self) -> None:
        """Forget the gradients that wait for `apply`."""
        with self._lock:
            self._pending = None

    def per_example_norms(self, X: Any, y: Any) -> np.ndarray:
        """The norm of every row's own gradient, over all parameters, ``(n,)``, of the network's dtype.

        A row's gradient is that of its own loss, class weights included; dropout is that of the next `step` on these
        rows. A weight's gradient by one row is the product of its input and its output gradient, so that the norms come
        out of one pass forward and back (Goodfellow 2015, "Efficient per-example gradient computations"). A
        `ValueError` where `BatchNorm1d` mixes the rows, a `FloatingPointError` where the loss of a row is NaN or
        infinite; likewise in `per_example_gradients` and `input_gradients`.
        """
        with self._lock:
            check_rows_apart(self.net, "per_example_norms")
            batches = self._mini_batch(X, y, None)
            norms = np.empty(len(batches.X), self.net.dtype)
            self._each_row(batches, norms=norms)
            return norms

    def per_example_gradients(self, X: Any, y: Any, rows: Any = None) -> dict[str, np.ndarray]:
        """Every row's own gradient by parameter name, arrays ``(n, *shape)``.

        Their mean over the rows is what `gradients` returns, where there are no class weights. Dropout goes by a row's
        place among those that are taken.

        Parameters
        ----------
        X, y : array-like
            As in `step`.
        rows : array-like of int, optional
            Rows of `X` to take, n of them; by default all.

        Raises
        ------
        MemoryError
            If the machine has not the memory that they take, 4 or 8 bytes a row and parameter, where that is over
            64 MiB; the message has the figures.
        IndexError
            If `rows` names a row that isn't there.
        """
        with self._lock:
            check_rows_apart(self.net, "per_example_gradients")
            batches = self._mini_batch(X, y, None)
            if rows is not None:
                batches.order = check_rows(rows, len(batches.X))
            n = len(batches.X) if batches.order is None else len(batches.order)
            batches.batch_size = n
            plan = self.net.plan
            bytes_ = n * plan.n_parameters * plan.dtype.itemsize
            if bytes_ > UNASKED and bytes_ > (there := available_memory()):
                raise MemoryError(
                    f"the gradients of {n} rows take {_gigabytes(bytes_)}; {_gigabytes(there)} are available "
                    f"(take fewer rows at a time: per_example_gradients(X, y, rows=...))"
                )
            empty_arrays = compiled("empty_arrays") or _empty_arrays
            found: dict[str, np.ndarray] = empty_arrays(n, plan.shapes, plan.dtype)
            if n:
                whole = list(map(found.get, plan.pairs))
                self._each_row(batches, gradients=whole)
            return found

    def per_example_losses(self, X: Any, y: Any) -> np.ndarray:
        """Every row's own loss, ``(n,)`` float64, class weights included, as `evaluate` takes it: without dropout, and
        with the running statistics of `BatchNorm1d`.
        """
        with self._lock:
            batches = self._mini_batch(X, y, None)
            n = len(batches.X)
            out, losses, weights = np.empty((n, self.net.plan.n_outputs), self.net.dtype), np.empty(n), np.empty(n)
            self._executor.evaluate(batches, out, losses, weights)
            return losses

    def input_gradients(self, X: Any, y: Any) -> np.ndarray:
        """Every row's own loss, differentiated by its inputs: ``(n, n_features)``, of the network's dtype.

        With respect to `X` as it is given (``input_scale`` is in it). Dropout is that of the next `step`.
        """
        with self._lock:
            check_rows_apart(self.net, "input_gradients")
            batches = self._mini_batch(X, y, None)
            inputs = np.empty(batches.X.shape, self.net.dtype)
            self._each_row(batches, inputs=inputs)
            return inputs

    def _each_row(self, batches: Batches, **wanted: Any) -> None:
        sums = np.zeros((1, 2))
        if not self._executor.per_example(batches, self.t, sums, **wanted):
            raise FloatingPointError(f"the loss is {sums[0, 0]}: per_example_losses tells of which rows")

    def _outside(self, X: Any, output_gradients: Any) -> Batches:
        """Rows with the gradients of their outputs, checked."""
        X = check_X(X, self.net.plan.n_features, False)
        given = check_output_gradients(output_gradients, X, self.net.plan.n_outputs)
        return Batches(X, given, None, None, len(X), self.input_scale)

    def _outside_executor(self) -> Executor:
        """The trainer's executor, but for its loss: the one whose gradient comes from outside."""
        return self._executor_for(FromOutside())


def _empty_arrays(n: int, shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> dict[str, np.ndarray]:
    """Arrays (n, *shape) by name, uninitialised. The extension's begin at cache lines, which is faster to write."""
    return {name: np.empty((n, *shape), dtype) for name, shape in shapes.items()}


def check_rows_apart(net: Sequential, what: str) -> None:
    """Raise a `ValueError` if the rows of a mini-batch have no gradients of their own."""
    for i in net.plan.batch_norms:
        raise ValueError(
            f"{what} needs every row's own gradient; in training, BatchNorm1d (module {net.plan.stages[i].name}) mixes "
            "the rows of a mini-batch (LayerNorm doesn't)"
        )


def available_memory() -> int:
    """Bytes that this process may still take: the machine's, or what is left of its cgroup's limit."""
    import os

    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    try:
        with open("/proc/meminfo") as file:
            found = [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:")] or found
    except OSError:
        pass
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            with open(f"/sys/fs/cgroup/{limit}") as most, open(f"/sys/fs/cgroup/{used}") as now:
                found.append(int(most.read()) - int(now.read()))
        except (OSError, ValueError):
            pass
    return max(0, min(found))


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:.3g} GB"


def _mean(sums: np.ndarray) -> float:
    total, weight = sums[0].tolist()
    return total / weight if weight else float("nan")
