"""Steps divided by the size of the gradients so far: RMSprop, Adagrad, Adadelta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import LearningRate, Optimizer, Scheduled, declaration


@declaration
@dataclass(frozen=True, repr=False)
class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton 2012). As `torch.optim.RMSprop`.

    Parameters
    ----------
    lr : float or callable, default 1e-2
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
        `weight_decay` may be such functions, too. `groups`: see `Optimizer`.
    alpha : float, default 0.99
        Decay of the mean of the squared gradient, in [0, 1).
    eps : float, default 1e-8
        Added to its root, greater than 0.
    weight_decay : float, default 0
        L2 penalty: adds ``weight_decay * w`` to the gradient of every parameter.
    momentum : float, default 0
        In [0, 1).
    centered : bool, default False
        Divide by the standard deviation of the gradient (Graves 2013) instead of its root mean square.
    """

    lr: LearningRate = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0
    momentum: Scheduled = 0.0
    centered: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(alpha="[0, 1)", eps="(0, inf)")

    @property
    def kind(self) -> str:
        return "rmsprop" + ("_centered" if self.centered else "") + ("_momentum" if self.momentum else "")

    def _entries(self, t: Any, lr: Any, h: Any) -> tuple[Any, ...]:  # noqa: ARG002
        return lr, h.weight_decay, self.alpha, 1.0 - self.alpha, self.eps, h.momentum


@declaration
@dataclass(frozen=True, repr=False)
class Adagrad(Optimizer):
    """Adagrad (Duchi, Hazan and Singer 2011). As `torch.optim.Adagrad`.

    Parameters
    ----------
    lr : float or callable, default 1e-2
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
        `weight_decay` may be such functions, too. `groups`: see `Optimizer`.
    lr_decay : float, default 0
        Divides the learning rate by ``1 + lr_decay * (updates made so far)``.
    weight_decay : float, default 0
        L2 penalty: adds ``weight_decay * w`` to the gradient of every parameter.
    initial_accumulator_value : float, default 0
        Where the sum of squared gradients starts.
    eps : float, default 1e-10
        Added to its root, greater than 0.
    """

    lr: LearningRate = 1e-2
    lr_decay: float = 0.0
    weight_decay: Scheduled = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(lr_decay="[0, inf)", initial_accumulator_value="[0, inf)", eps="(0, inf)")

    @property
    def kind(self) -> str:
        return "adagrad"

    @property
    def initial_state(self) -> float:
        return self.initial_accumulator_value

    def _entries(self, t: Any, lr: Any, h: Any) -> tuple[Any, ...]:
        return lr / (1.0 + (t - 1) * self.lr_decay), h.weight_decay, self.eps


@declaration
@dataclass(frozen=True, repr=False)
class Adadelta(Optimizer):
    """Adadelta (Zeiler 2012). As `torch.optim.Adadelta`.

    Parameters
    ----------
    lr : float or callable, default 1
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
        `weight_decay` may be such functions, too. `groups`: see `Optimizer`.
    rho : float, default 0.9
        Decay of the means of the squared gradient and of the squared step, in [0, 1).
    eps : float, default 1e-6
        Added to both before the root is taken, greater than 0.
    weight_decay : float, default 0
        L2 penalty: adds ``weight_decay * w`` to the gradient of every parameter.
    """

    lr: LearningRate = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: Scheduled = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(rho="[0, 1)", eps="(0, inf)")

    @property
    def kind(self) -> str:
        return "adadelta"

    def _entries(self, t: Any, lr: Any, h: Any) -> tuple[Any, ...]:  # noqa: ARG002
        return lr, h.weight_decay, self.rho, 1.0 - self.rho, self.eps
