"""Averages of the weights, kept while they are trained: `EMA` over updates, `SWA` over epochs.

A `Trainer` is given one as ``average=``. The average is one row more of its state, so that it is saved, pickled and
goes back after a divergence with the rest. `EMA` is taken by the executor as it updates the weights; `SWA`, once an
epoch, here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._arithmetic import cospi, power
from ._checks import boolean, integer, number
from ._errors import unknown_name


@dataclass(frozen=True)
class Average:
    """What all averages have. They are declarations; the trainer has the numbers."""

    @property
    def each_update(self) -> bool:
        """Whether the executor is to take the average, after every update."""
        return False

    def count(self, t: int, epoch: int) -> int:
        """The weights that the average is taken over after `t` updates and `epoch` epochs; 0: there is none yet."""
        raise NotImplementedError

    def weights(self, t: int, n: int) -> np.ndarray:
        """How much the weights after each of the `n` updates after `t` count, ``(n,)``, where `each_update`."""
        raise NotImplementedError

    def learning_rates(self, rates: np.ndarray, epoch: int) -> np.ndarray:  # noqa: ARG002
        """The learning rates to use in place of the optimiser's own, after `epoch` epochs."""
        return rates


@dataclass(frozen=True)
class EMA(Average):
    """The exponential moving average of the weights: ``average = d average + (1 - d) weights``.

    As `torch.optim.swa_utils.AveragedModel` with ``get_ema_multi_avg_fn(d)`` (Polyak and Juditsky 1992), whose
    ``update_parameters`` is called after every `every`-th update, with ``d = decay ** every``. The first time, the
    average becomes the weights. Running statistics of `BatchNorm1d` are in no average: beside the averaged weights, in
    a fit's validation too, stand those of the weights that are trained, until `Trainer.update_bn` takes their own.

    Parameters
    ----------
    decay : float, default 0.999
        A single update's, in [0, 1).
    every : int, default 10
        Updates from one to the next whose weights count. With 1 all do, which costs up to a tenth of a step where
        mini-batches are small, and changes next to nothing where `every` is well below ``1 / (1 - decay)``.
    validate : bool, default True
        Whether a fit's validation, and so what callbacks monitor, is of the average.

    Examples
    --------
    >>> import fastmb as mb
    >>> X, y = mb.datasets.load_digits()
    >>> trainer = mb.Trainer(mb.mlp([64, 32, 10]), optimizer=mb.Adam(0.01), input_scale=1 / 16, average=mb.EMA(0.99))
    >>> history = trainer.fit(X[:1500], y[:1500], max_epochs=5, verbose=0)
    >>> with trainer.averaged():
    ...     accuracy = trainer.evaluate(X[1500:], y[1500:])["accuracy"]
    >>> net = trainer.averaged_net()  # to keep
    """

    decay: float = 0.999
    every: int = 10
    validate: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", number("decay", self.decay, "[0, 1)"))
        object.__setattr__(self, "every", integer("every", self.every, 1, 2**53))
        object.__setattr__(self, "validate", boolean("validate", self.validate))

    @property
    def each_update(self) -> bool:
        return True

    def count(self, t: int, epoch: int) -> int:  # noqa: ARG002
        return t // self.every

    def weights(self, t: int, n: int) -> np.ndarray:
        after = np.arange(t + 1, t + n + 1)
        weight = 1.0 - power(self.decay, np.array([self.every])).item()
        return np.where(after == self.every, 1.0, np.where(after % self.every == 0, weight, 0.0))


@dataclass(frozen=True)
class SWA(Average):
    """Stochastic weight averaging (Izmailov et al. 2018): the mean of the weights after each epoch from some on.

    As `torch.optim.swa_utils.AveragedModel` and `SWALR`. Running statistics of `BatchNorm1d` are in no average: beside
    the averaged weights, in a fit's validation too, stand those of the weights that are trained, until
    `Trainer.update_bn` takes their own.

    Parameters
    ----------
    start_epoch : int
        Epochs before the first that counts: weights count after epoch start_epoch + 1, start_epoch + 2, ...
    lr : float, optional
        The learning rate that epochs after these go to; default: the optimiser's own.
    anneal_epochs : int, default 10
        Epochs on the way there. With 0 it is there at once.
    anneal_strategy : {"cos", "linear"}, default "cos"
        How it goes.
    validate : bool, default True
        Whether a fit's validation, and so what callbacks monitor, is of the average once there is one.

    Examples
    --------
    >>> import fastmb as mb
    >>> X, y = mb.datasets.load_digits()
    >>> swa = mb.SWA(start_epoch=6, lr=0.2, anneal_epochs=2, anneal_strategy="linear")
    >>> trainer = mb.Trainer(mb.mlp([64, 32, 10]), optimizer=mb.SGD(0.1), input_scale=1 / 16, average=swa)
    >>> trainer.fit(X, y, max_epochs=10, verbose=0)["lr"][-4:]
    [0.1, 0.15, 0.2, 0.2]
    """

    start_epoch: int
    lr: float | None = None
    anneal_epochs: int = 10
    anneal_strategy: str = "cos"
    validate: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "start_epoch", integer("start_epoch", self.start_epoch, 0, 2**53))
        if self.lr is not None:
            object.__setattr__(self, "lr", number("lr", self.lr, "[0, inf)"))
        object.__setattr__(self, "anneal_epochs", integer("anneal_epochs", self.anneal_epochs, 0, 2**53))
        if self.anneal_strategy not in ("cos", "linear"):
            raise unknown_name("anneal_strategy", self.anneal_strategy, ("cos", "linear"))
        object.__setattr__(self, "validate", boolean("validate", self.validate))

    def count(self, t: int, epoch: int) -> int:  # noqa: ARG002
        return max(0, epoch - self.start_epoch)

    def learning_rates(self, rates: np.ndarray, epoch: int) -> np.ndarray:
        if self.lr is None or epoch < self.start_epoch:
            return rates
        done = min(1.0, (epoch - self.start_epoch) / self.anneal_epochs) if self.anneal_epochs else 1.0
        share = done if self.anneal_strategy == "linear" else ((1.0 - cospi(np.array([done]))) / 2.0).item()
        return self.lr * share + rates * (1.0 - share)


def averaged_alike(one: Average | None, other: Average | None, t: int, epoch: int) -> bool:
    """Whether what `one` has averaged so far can be gone on with by `other`."""
    if one is None or other is None:
        return one is other
    return type(one) is type(other) and one.count(t, epoch) == other.count(t, epoch)


AVERAGES: dict[str, type[Average]] = {cls.__name__: cls for cls in (EMA, SWA)}
