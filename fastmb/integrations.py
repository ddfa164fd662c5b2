"""Callbacks that hand a fit's figures to other packages: TensorBoard, MLflow, Optuna.

Each package is imported when a fit begins that has its callback, and named with the extra that brings it if it is
missing. Loggers take every epoch's row of the history and, if asked, the loss of every n-th mini-batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from itertools import count
from typing import TYPE_CHECKING, Any

from ._checks import integer
from ._errors import missing_extra, unknown_name
from ._metrics import falls
from .callbacks import Callback, check_monitor

if TYPE_CHECKING:
    from .trainer import Trainer

_LONGEST = 500  # characters of a parameter that every MLflow server takes
_writers = count()  # several in one process and second need file names of their own


class _Logger(Callback):
    """What loggers share: when figures are logged. They define `_log`."""

    def __init__(self, update_freq: str | int) -> None:
        if isinstance(update_freq, str):
            if update_freq not in ("epoch", "batch"):
                raise unknown_name("update_freq", update_freq, ("epoch", "batch"))
            self._every = 1 if update_freq == "batch" else 0
        else:
            self._every = integer("update_freq", update_freq, 1)
        self.update_freq = update_freq

    @property
    def wants_batches(self) -> bool:
        """Whether `update_freq` is anything but ``"epoch"``."""
        return self._every > 0

    def on_epoch_end(self, trainer: Trainer, row: Mapping[str, float]) -> None:  # noqa: ARG002
        self._log({name: value for name, value in row.items() if name != "epoch"}, int(row["epoch"]))

    def on_batch_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.t % self._every == 0:
            self._log({"batch_loss": loss}, trainer.t)

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        raise NotImplementedError


class TensorBoard(_Logger):
    """Writes the figures of a fit to event files, which TensorBoard shows.

    Needs tensorboardX: ``pip install 'fastmb[tensorboard]'``. The columns of the history are scalars of their names
    against the epoch; `batch_loss` is against the number of updates.

    Parameters
    ----------
    log_dir : str or path-like, optional
        The folder, one for each run that is to be told apart. Default: a new one in ``runs``, named after time and
        host.
    update_freq : {"epoch", "batch"} or int, default "epoch"
        Log every epoch; with ``"batch"`` or a number n also the loss of every (n-th) mini-batch. Then a fit enters
        Python after each.

    Attributes
    ----------
    log_dir : str or path-like
        The folder, known when a fit has begun.

    Examples
    --------
    >>> import fastmb as mb, glob, tempfile
    >>> X, y = mb.datasets.load_digits()
    >>> trainer = mb.Trainer(mb.mlp([64, 32, 10]), input_scale=1 / 16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     history = trainer.fit(X, y, max_epochs=3, callbacks=[mb.TensorBoard(folder)], verbose=0)
    ...     len(glob.glob(folder + "/events*"))
    1
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None = None, update_freq: str | int = "epoch") -> None:
        super().__init__(update_freq)
        self.log_dir = log_dir
        self._writer: Any = None

    def on_fit_begin(self, trainer: Trainer, metrics: Sequence[str]) -> None:  # noqa: ARG002
        tensorboard = _imported("tensorboardX", "tensorboard", "TensorBoard()")
        log_dir = None if self.log_dir is None else os.fspath(self.log_dir)
        self._writer = tensorboard.SummaryWriter(log_dir, filename_suffix=f".{os.getpid()}.{next(_writers)}")
        self.log_dir = self._writer.logdir
        self._writer.add_text("trainer", f"```\n{trainer.net!r}\n{trainer!r}\n```", trainer.epoch)

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def on_fit_end(self, trainer: Trainer) -> None:  # noqa: ARG002
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:  # noqa: ARG002
        self.on_fit_end(trainer)


class MLflow(_Logger):
    """Logs the settings of a trainer as parameters, and the figures of a fit as metrics, to MLflow.

    Needs MLflow: ``pip install 'fastmb[mlflow]'``. They go to the active run if there is one, which stays active. Else
    a run is started, and ended with the fit; a further fit with the same callback goes on with it. A setting that has
    been assigned anew by then is a tag of the same name, as parameters can't change. A fit that raised leaves its run
    with the status ``FAILED``. Where runs are kept is for MLflow to know: ``mlflow.set_tracking_uri``.

    Parameters
    ----------
    run_name : str, optional
        Of a run that is started. Default: MLflow makes one up.
    update_freq : {"epoch", "batch"} or int, default "epoch"
        Log every epoch; with ``"batch"`` or a number n also the loss of every (n-th) mini-batch. Then a fit enters
        Python after each.

    Attributes
    ----------
    run_id : str or None
        The run of the last fit.

    Examples
    --------
    >>> import mlflow  # doctest: +SKIP
    >>> with mlflow.start_run() as run:  # doctest: +SKIP
    ...     trainer.fit(X, y, callbacks=[mb.MLflow()])
    >>> mlflow.get_run(run.info.run_id).data.metrics["loss"]  # doctest: +SKIP
    0.0123
    """

    def __init__(self, run_name: str | None = None, update_freq: str | int = "epoch") -> None:
        super().__init__(update_freq)
        self.run_name = run_name
        self.run_id: str | None = None
        self._own = self._running = False

    def on_fit_begin(self, trainer: Trainer, metrics: Sequence[str]) -> None:  # noqa: ARG002
        mlflow = self._mlflow = _imported("mlflow", "mlflow", "MLflow()")
        run = mlflow.active_run()
        if run is None:
            run = mlflow.start_run(run_id=self.run_id if self._own else None, run_name=self.run_name)
            self._own = self._running = True
        elif run.info.run_id != self.run_id:
            self._own = False
        self.run_id = run.info.run_id
        self._log_settings(_settings(trainer))

    def _log_settings(self, settings: dict[str, str]) -> None:
        """Parameters, which MLflow takes once; a setting that is another than the run's is a tag of its name."""
        known = self._mlflow.get_run(self.run_id).data
        new = {name: value for name, value in settings.items() if name not in known.params}
        self._mlflow.log_params(new, run_id=self.run_id)
        present, client = known.params | known.tags, self._mlflow.MlflowClient()
        for name, value in settings.items():
            if present.get(name, value) != value:
                client.set_tag(self.run_id, name, value)

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(figures), step=step, run_id=self.run_id)

    def on_fit_end(self, trainer: Trainer) -> None:  # noqa: ARG002
        self._end("FINISHED")

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:  # noqa: ARG002
        self._end("FAILED")

    def _end(self, status: str) -> None:
        if self._running:
            self._mlflow.end_run(status)
        self._running = False


class OptunaPruning(Callback):
    """Reports every epoch to an Optuna trial, and ends the fit when Optuna says that the trial isn't worth more.

    Needs Optuna: ``pip install 'fastmb[optuna]'``. A fit that is pruned ends as any other, with ``history.stopped`` at
    ``"pruned"`` and the weights it had; then `fit` raises ``optuna.TrialPruned``, which the study expects.

    Parameters
    ----------
    trial : optuna.trial.Trial
        The trial, of a study with the direction of `monitor`. Epochs are its steps, so use it for one trainer.
    monitor : str, default "val_loss"
        What is to fall or to rise, as for `EarlyStopping`.

    Examples
    --------
    >>> def objective(trial):
    ...     net = mb.mlp([64, trial.suggest_int("hidden", 8, 256), 10])
    ...     trainer = mb.Trainer(net, optimizer=mb.Adam(trial.suggest_float("lr", 1e-4, 1e-1, log=True)))
    ...     pruning = mb.OptunaPruning(trial, "val_accuracy")
    ...     history = trainer.fit(X, y, X_val=X_val, y_val=y_val, max_epochs=30, callbacks=[pruning], verbose=0)
    ...     return max(history["val_accuracy"])
    >>> optuna.create_study(direction="maximize").optimize(objective, n_trials=50)  # doctest: +SKIP
    """

    def __init__(self, trial: Any, monitor: str = "val_loss") -> None:
        self.trial = trial
        self.monitor = monitor
        self._pruned_in = 0  # epoch

    def on_fit_begin(self, trainer: Trainer, metrics: Sequence[str]) -> None:  # noqa: ARG002
        self._optuna = _imported("optuna", "optuna", "OptunaPruning()")
        if not isinstance(self.trial, self._optuna.trial.BaseTrial):
            raise TypeError(f"trial must be an Optuna trial; got {self.trial!r}")
        check_monitor(self.monitor, metrics)
        study = getattr(self.trial, "study", None)  # a FixedTrial has none
        wanted = "minimize" if falls(self.monitor) else "maximize"
        if study is not None and (found := study.direction.name.lower()) != wanted:
            raise ValueError(
                f"monitor={self.monitor!r} needs a study with direction {wanted!r}; this one's is {found!r}"
            )
        self._pruned_in = 0

    def on_epoch_end(self, trainer: Trainer, row: Mapping[str, float]) -> str | None:  # noqa: ARG002
        epoch = int(row["epoch"])
        self.trial.report(row[self.monitor], epoch)
        if not self.trial.should_prune():
            return None
        self._pruned_in = epoch
        return "pruned"

    def on_fit_end(self, trainer: Trainer) -> None:  # noqa: ARG002
        if self._pruned_in:
            raise self._optuna.TrialPruned(f"pruned after epoch {self._pruned_in}")


def _imported(package: str, extra: str, purpose: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise missing_extra(package, extra, purpose) from None


def _settings(trainer: Trainer) -> dict[str, str]:
    """What a run is told by: the parts of a trainer, and the optimiser's parameters under their own names."""
    from .checkpoint import _SETTINGS

    net, optimizer = trainer.net, trainer.optimizer
    found: dict[str, object] = {
        "net": ", ".join(map(repr, net.modules)),
        "n_parameters": sum(array.size for array in net.parameters().values()),
        "dtype": net.dtype.name,
        "net_seed": net.seed,
        "loss": trainer.loss,
        "optimizer": type(optimizer).__name__,
    }
    found |= {field.name: getattr(optimizer, field.name) for field in fields(optimizer) if field.init}
    found |= {name: getattr(trainer, name) for name in _SETTINGS}
    return {name: _shortened(str(value)) for name, value in found.items()}


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
