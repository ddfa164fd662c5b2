"""Callbacks: what a fit calls between epochs, and between mini-batches if asked to.

`Trainer.fit` is given instances and calls `Callback.on_fit_begin` when all data are checked, `on_epoch_end` after every
complete epoch, `on_batch_end` after every mini-batch where a class overrides it (only then does a fit enter Python
there), and `on_fit_end`, or `on_exception` if the fit raised. What ends a fit is the string that one of them returns.
Those that need other packages are in `fastmb.integrations`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._checks import boolean, integer, number
from ._errors import unknown_metric
from ._metrics import falls
from .history import _FIRST, _LAST

if TYPE_CHECKING:
    from .trainer import Trainer


class Callback:
    """The base of callbacks: override what is needed. In all methods `trainer` is at the place that they say.

    Until it has ended, from `on_fit_begin` on, a fit of `trainer` is under way. `trainer` can be looked at, evaluated,
    saved and copied, and ``trainer.optimizer = SGD(lr=0.01)`` counts from the next mini-batch on, if the optimiser's
    kind and groups stay. `Trainer.step`, `apply`, `load`, another `fit`, and other settings are refused.

    Examples
    --------
    >>> import fastmb as mb
    >>> class Patient(mb.Callback):
    ...     def on_epoch_end(self, trainer, row):
    ...         return "good enough" if row["loss"] < 1 else None
    >>> X, y = mb.datasets.load_digits()
    >>> trainer = mb.Trainer(mb.mlp([64, 32, 10]), input_scale=1 / 16)
    >>> trainer.fit(X, y, max_epochs=50, callbacks=[Patient()], verbose=0).stopped
    'good enough'
    """

    @property
    def wants_batches(self) -> bool:
        """Whether `on_batch_end` is to be called: if the class overrides it, unless this is overridden too."""
        return type(self).on_batch_end is not Callback.on_batch_end

    def on_fit_begin(self, trainer: Trainer, metrics: Sequence[str]) -> None:
        """Before the first epoch; `metrics` names the losses, metrics and figures of gradients that rows will have."""

    def on_epoch_end(self, trainer: Trainer, row: Mapping[str, float]) -> str | None:  # noqa: ARG002
        """After an epoch and its validation, with its row of the history; a string returned ends the fit.

        Epochs that are broken off don't count. The row can only be read; ``dict(row)`` is a copy.
        """
        return None

    def on_batch_end(self, trainer: Trainer, loss: float) -> str | None:  # noqa: ARG002
        """After a mini-batch, update number ``trainer.t``, with its loss; a string returned ends the fit."""
        return None

    def on_fit_end(self, trainer: Trainer) -> None:
        """When the fit has ended, for the reason ``trainer.history.stopped``; not if it raised.

        All callbacks are called, also after one that raises here: then `fit` raises, but the fit has ended.
        """

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """When the fit raised, even before `on_fit_begin` was called: another callback's may have raised.

        What is raised here is noted with `error`, which is what `fit` raises.
        """


class EarlyStopping(Callback):
    """Ends the fit when a metric doesn't improve any more; ``history.stopped`` is then ``"early_stopping"``.

    Parameters
    ----------
    monitor : str, default "val_loss"
        A loss or metric in the history: losses are to fall, metrics to rise. Of the figures of `gradient_stats`, norms
        and the variance are to fall, noise scales to rise.
    patience : int, default 10
        Epochs in a row without improvement that end the fit.
    min_delta : float, default 0
        An improvement is by more than this.
    restore_best : bool, default False
        Whether the network has the weights (and running statistics) of the best epoch when the fit has ended, for
        whatever reason: those that were validated, with an `EMA` the average. The optimiser's state and the position
        are those of the last epoch. A fit that raised, or was broken off in the middle of an epoch, which a later one
        goes on with, leaves the network as it is; then `restore` does it.

    Attributes
    ----------
    best : float or None
        The best value of the last fit, None before there is one.
    best_epoch : int
        Its epoch, as in the history.

    Examples
    --------
    >>> import fastmb as mb
    >>> X, y = mb.datasets.load_digits()
    >>> trainer = mb.Trainer(mb.mlp([64, 32, 10]), optimizer=mb.Adam(lr=0.01), input_scale=1 / 16)
    >>> stopping = mb.EarlyStopping("val_accuracy", patience=3, restore_best=True)
    >>> data = dict(X_val=X[1500:], y_val=y[1500:], max_epochs=100, verbose=0)
    >>> trainer.fit(X[:1500], y[:1500], callbacks=[stopping], **data).stopped
    'early_stopping'
    >>> trainer.evaluate(X[1500:], y[1500:])["accuracy"] == stopping.best
    True
    """

    def __init__(
        self, monitor: str = "val_loss", patience: int = 10, min_delta: float = 0.0, restore_best: bool = False
    ) -> None:
        self.monitor = monitor
        self.patience = integer("patience", patience, 1)
        self.min_delta = number("min_delta", min_delta, "[0, inf)")
        self.restore_best = boolean("restore_best", restore_best)
        self.best: float | None = None
        self.best_epoch = 0
        self._weights: list[np.ndarray] | None = None  # of the best epoch, until another fit begins

    def on_fit_begin(self, trainer: Trainer, metrics: Sequence[str]) -> None:  # noqa: ARG002
        check_monitor(self.monitor, metrics)
        self.best, self.best_epoch, self._weights, self._waited = None, 0, None, 0

    def on_epoch_end(self, trainer: Trainer, row: Mapping[str, float]) -> str | None:
        if improved(self.monitor, row[self.monitor], self.best, self.min_delta):
            self.best, self.best_epoch, self._waited = row[self.monitor], int(row["epoch"]), 0
            if self.restore_best and self._weights is None:
                self._weights = [array.copy() for array in self._validated(trainer)]
            elif self._weights is not None:
                for kept, array in zip(self._weights, self._validated(trainer), strict=True):
                    kept[:] = array
            return None
        self._waited += 1
        return "early_stopping" if self._waited >= self.patience else None

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._weights is not None and trainer._current is None:
            self.restore(trainer)

    def restore(self, trainer: Trainer) -> None:
        """Put the weights (and running statistics) of the best epoch of the last fit into the trainer's network.

        What `restore_best` does when a fit ends, for one that ended otherwise: by Ctrl-C or `max_seconds` in the middle
        of an epoch, or by an exception. A later fit then goes on from these weights, but with the optimiser's state,
        and in the place, where the other ended. The weights are kept until another fit begins with this callback.

        Parameters
        ----------
        trainer : Trainer
            The one of the fit, or one with a network like its.

        Raises
        ------
        ValueError
            If there are none: without `restore_best`, or before an epoch with a value. If the network is another one.
        """
        if self._weights is None:
            raise ValueError(
                "there are no weights to restore: EarlyStopping(restore_best=True) keeps them, from the first epoch "
                f"of a fit whose {self.monitor} is no NaN"
            )
        with trainer._lock:
            trainer._check_own_weights()
            learned = trainer.net._learned
            if [(a.dtype, a.shape) for a in learned] != [(a.dtype, a.shape) for a in self._weights]:
                raise ValueError("the weights to restore are those of another network than this trainer's")
            for array, kept in zip(learned, self._weights, strict=True):
                array[:] = kept

    def _validated(self, trainer: Trainer) -> list[np.ndarray]:
        return [trainer._validated_flat(), *trainer.net._learned[1:]]


class ModelCheckpoint(Callback):
    """Saves the trainer after every epoch, or after those that are better than all before; see `Trainer.save`.

    Parameters
    ----------
    path : str or path-like
        The file, replaced each time.
    monitor : str, default "val_loss"
        What is to fall or to rise, as for `EarlyStopping`. Only looked at with `save_best_only`.
    save_best_only : bool, default False
        Save an epoch only if it is the best one so far, in all fits that this callback was in.

    Attributes
    ----------
    best : float or None
        The value of the epoch that was saved last, with `save_best_only`.

    Examples
    --------
    >>> import fastmb as mb, os, tempfile
    >>> X, y = mb.datasets.load_digits()
    >>> trainer = mb.Trainer(mb.mlp([64, 32, 10]), input_scale=1 / 16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     best = mb.ModelCheckpoint(os.path.join(folder, "best"), monitor="loss", save_best_only=True)
    ...     history = trainer.fit(X, y, max_epochs=3, callbacks=[best], verbose=0)
    ...     mb.load(best.path).history["loss"][-1] == min(history["loss"])
    True
    """

    def __init__(self, path: str | os.PathLike[str], monitor: str = "val_loss", save_best_only: bool = False) -> None:
        self.path = Path(path)
        self.monitor = monitor
        self.save_best_only = boolean("save_best_only", save_best_only)
        self.best: float | None = None

    def on_fit_begin(self, trainer: Trainer, metrics: Sequence[str]) -> None:
        from ._files import check_path
        from .checkpoint import describe

        if self.save_best_only:
            check_monitor(self.monitor, metrics)
        check_path(self.path)
        describe(trainer, {})  # what can't be saved is told now, not after an epoch

    def on_epoch_end(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        if self.save_best_only and not improved(self.monitor, row[self.monitor], self.best):
            return
        trainer.save(self.path)
        if self.save_best_only:
            self.best = row[self.monitor]


class CSVLogger(Callback):
    """Writes the rows of the history to a CSV file, each as soon as its epoch is complete.

    Parameters
    ----------
    path : str or path-like
        The file. The first epoch of the first fit replaces one that is there; what follows is appended.
    append : bool, default False
        Append from the first fit on.

    Examples
    --------
    >>> import fastmb as mb, os, tempfile
    >>> X, y = mb.datasets.load_digits()
    >>> trainer = mb.Trainer(mb.mlp([64, 32, 10]), input_scale=1 / 16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = mb.CSVLogger(os.path.join(folder, "log.csv"))
    ...     history = trainer.fit(X, y, max_epochs=3, callbacks=[log], verbose=0)
    ...     log.path.read_text().splitlines()[0]
    'epoch,loss,lr,seconds,examples_per_second'
    """

    def __init__(self, path: str | os.PathLike[str], append: bool = False) -> None:
        self.path = Path(path)
        self.append = boolean("append", append)
        self._columns: tuple[str, ...] = ()
        self._mine = False  # whether there is a row of this callback's
        self._fresh = True  # whether the next row begins the file

    def on_fit_begin(self, trainer: Trainer, metrics: Sequence[str]) -> None:  # noqa: ARG002
        columns = (_FIRST[0], *metrics, *_LAST)
        with self.path.open("a"):
            pass  # that it can't be written is told now; what is there goes when there is a row instead
        self._fresh = not ((self.append or self._mine) and self.path.stat().st_size)
        if not self._fresh:
            with self.path.open(encoding="utf-8") as file:
                there = file.readline().rstrip("\n")
            if there != ",".join(columns):
                raise ValueError(
                    f"{os.fspath(self.path)} begins with {there!r}, this fit has the columns {','.join(columns)!r}: "
                    "give CSVLogger another path"
                )
        self._columns = columns

    def on_epoch_end(self, trainer: Trainer, row: Mapping[str, float]) -> None:  # noqa: ARG002
        lines = [self._columns] * self._fresh + [tuple(str(row[column]) for column in self._columns)]
        with self.path.open("w" if self._fresh else "a", encoding="utf-8") as file:
            file.writelines(",".join(cells) + "\n" for cells in lines)
        self._mine, self._fresh = True, False


def check_callbacks(callbacks: object) -> tuple[Callback, ...]:
    """`callbacks` as a tuple, if it is a sequence of instances."""
    found = tuple(callbacks) if isinstance(callbacks, list | tuple) else (callbacks,)
    for callback in found:
        if not isinstance(callback, Callback):
            raise TypeError(f"callbacks must be a list of callbacks such as [EarlyStopping()]; got {callbacks!r}")
    return found


def end_fit(trainer: Trainer, callbacks: Sequence[Callback]) -> None:
    """Call `on_fit_end` of all callbacks, of those after one that raises too."""
    with ExitStack() as stack:
        for callback in reversed(callbacks):
            stack.callback(callback.on_fit_end, trainer)


def check_monitor(monitor: object, metrics: Sequence[str]) -> None:
    """Raise a `ValueError` that lists the metrics unless `monitor` is one of them."""
    if monitor not in metrics:
        raise unknown_metric("monitor", monitor, metrics)


def improved(name: str, value: float, best: float | None, min_delta: float = 0.0) -> bool:
    """Whether `value` is better than `best` by more than `min_delta`; NaN never is."""
    if best is None:
        return value == value
    return value < best - min_delta if falls(name) else value > best + min_delta
