"""A learning rate that reacts to a metric: it falls where the metric doesn't improve any more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from .._checks import integer, number
from .._errors import unknown_name
from .._metrics import falls


class Standing(NamedTuple):
    """What a `ReduceLROnPlateau` knows after some epochs."""

    lr: float
    best: float
    bad_epochs: int
    cooldown: int


@dataclass(frozen=True)
class ReduceLROnPlateau:
    """Multiplied by `factor` when a metric has not improved for more than `patience` epochs.

    As `torch.optim.lr_scheduler.ReduceLROnPlateau`, stepped after every epoch. It is a declaration as the schedules
    are, for ``SGD(lr=ReduceLROnPlateau(0.1))``: where it stands follows from the trainer's history, and is saved with
    it. One that is assigned between fits, ``trainer.optimizer = SGD(lr=ReduceLROnPlateau(0.1))``, begins with the
    epochs after; so the same one goes on in ``replace(trainer.optimizer, weight_decay=0.1)``. It takes a number for
    `lr`, and is no part of sequences and chains.

    Parameters
    ----------
    lr : float
        The learning rate to begin with.
    monitor : str, default "val_loss"
        A loss or metric in the history, or a figure of `gradient_stats`. A fit whose rows don't have it is refused.
    mode : {"min", "max"}, optional
        Whether the metric is to fall or to rise. Default: as for `EarlyStopping`.
    factor : float, default 0.1
        In [0, 1).
    patience : int, default 10
        Epochs in a row without improvement that change nothing yet.
    threshold : float, default 1e-4
        An improvement is by more than this,
    threshold_mode : {"rel", "abs"}, default "rel"
        as a share of the best value so far, or as it is.
    cooldown : int, default 0
        Epochs after a reduction that don't count as bad.
    min_lr : float, default 0
        The least rate.
    eps : float, default 1e-8
        A reduction by no more than this isn't made.

    Examples
    --------
    >>> import fastmb as mb
    >>> X, y = mb.datasets.load_digits()
    >>> rate = mb.ReduceLROnPlateau(0.5, "loss", patience=0, threshold=0.2)
    >>> trainer = mb.Trainer(mb.mlp([64, 32, 10]), optimizer=mb.SGD(rate), input_scale=1 / 16)
    >>> trainer.fit(X, y, max_epochs=5, verbose=0)["lr"]
    [0.5, 0.5, 0.5, 0.5, 0.05]
    """

    lr: float
    monitor: str = "val_loss"
    mode: str | None = None
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: int = 0
    min_lr: float = 0.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        intervals = {"factor": "[0, 1)", "lr": "[0, inf)", "threshold": "[0, inf)", "min_lr": "[0, inf)"}
        for name, interval in {**intervals, "eps": "[0, inf)"}.items():
            object.__setattr__(self, name, number(name, getattr(self, name), interval))
        for name in ("patience", "cooldown"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 0, 2**53))
        if not isinstance(self.monitor, str):
            raise TypeError(f"monitor must be the name of a metric; got {self.monitor!r}")
        if self.mode not in ("min", "max", None):
            raise unknown_name("mode", self.mode, ("min", "max"))
        if self.threshold_mode not in ("rel", "abs"):
            raise unknown_name("threshold_mode", self.threshold_mode, ("rel", "abs"))

    @property
    def falls(self) -> bool:
        """Whether the metric is to fall."""
        return falls(self.monitor) if self.mode is None else self.mode == "min"

    def start(self) -> Standing:
        """Before the first epoch."""
        return Standing(self.lr, math.inf if self.falls else -math.inf, 0, 0)

    def after(self, standing: Standing, value: float) -> Standing:
        """After one epoch more, in which the metric was `value`."""
        lr, best, bad_epochs, cooldown = standing
        sign = -1.0 if self.falls else 1.0
        goal = best * (1.0 + sign * self.threshold) if self.threshold_mode == "rel" else best + sign * self.threshold
        better = value < goal if self.falls else value > goal
        best, bad_epochs = (value, 0) if better else (best, bad_epochs + 1)
        if cooldown > 0:
            cooldown, bad_epochs = cooldown - 1, 0
        if bad_epochs > self.patience:
            reduced = max(lr * self.factor, self.min_lr)
            lr = reduced if lr - reduced > self.eps else lr
            cooldown, bad_epochs = self.cooldown, 0
        return Standing(lr, best, bad_epochs, cooldown)
