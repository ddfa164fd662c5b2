"""Adam's relatives: NAdam, RAdam, Adamax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .._arithmetic import power, real_power
from .._checks import per_step
from .base import LearningRate, Optimizer, Scheduled, at_step, bias, declaration

_GONE = 2.0**-60  # a product that 1 doesn't notice


@declaration
@dataclass(frozen=True, repr=False)
class NAdam(Optimizer):
    """Adam with Nesterov's momentum (Dozat 2016). As `torch.optim.NAdam`.

    Parameters
    ----------
    lr : float or callable, default 2e-3
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
        `weight_decay` and each of `betas` may be such functions, too. `groups`: see `Optimizer`.
    betas : (float, float), default (0.9, 0.999)
        Decay of the means of the gradient and of its square, in [0, 1).
    eps : float, default 1e-8
        Added to the root of the mean square, greater than 0.
    weight_decay : float, default 0
        L2 penalty: adds ``weight_decay * w`` to the gradient of every parameter.
    momentum_decay : float, default 4e-3
        The momentum of step t is ``beta1 (1 - 0.96^(momentum_decay t) / 2)``.
    decoupled_weight_decay : bool, default False
        Multiply the weights by ``1 - lr * weight_decay`` instead, as `AdamW` does.
    """

    lr: LearningRate = 2e-3
    betas: tuple[Scheduled, Scheduled] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(eps="(0, inf)", momentum_decay="[0, inf)")

    @property
    def kind(self) -> str:
        return "nadam"

    def _entries(self, t: Any, lr: Any, h: Any) -> tuple[Any, ...]:
        beta1, beta2 = h.betas
        root, of_gradient, of_mean = at_step(_nesterov, t, beta1, beta2, self.momentum_decay, self.betas[0])
        l2, shrink = _decay(self, lr, h.weight_decay)
        return lr * of_mean, l2, shrink, 1.0 - beta1, beta2, 1.0 - beta2, self.eps * root, lr * of_gradient


@declaration
@dataclass(frozen=True, repr=False)
class RAdam(Optimizer):
    """Adam with a rectified variance (Liu et al. 2020). As `torch.optim.RAdam`.

    As long as the variance can't be known, steps are those of a momentum.

    Parameters
    ----------
    lr : float or callable, default 1e-3
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
        `weight_decay` and each of `betas` may be such functions, too. `groups`: see `Optimizer`.
    betas : (float, float), default (0.9, 0.999)
        Decay of the means of the gradient and of its square, in [0, 1).
    eps : float, default 1e-8
        Added to the root of the mean square, greater than 0.
    weight_decay : float, default 0
        L2 penalty: adds ``weight_decay * w`` to the gradient of every parameter.
    decoupled_weight_decay : bool, default False
        Multiply the weights by ``1 - lr * weight_decay`` instead, as `AdamW` does.
    """

    betas: tuple[Scheduled, Scheduled] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0
    decoupled_weight_decay: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(eps="(0, inf)")

    @property
    def kind(self) -> str:
        return "radam"

    def _entries(self, t: Any, lr: Any, h: Any) -> tuple[Any, ...]:
        beta1, beta2 = h.betas
        size, known = at_step(_rectified, t, beta1, beta2)
        l2, shrink = _decay(self, lr, h.weight_decay)
        added = self.eps * known + (1.0 - known)
        return lr * size, l2, shrink, 1.0 - beta1, beta2, 1.0 - beta2, added, known


@declaration
@dataclass(frozen=True, repr=False)
class Adamax(Optimizer):
    """Adam with the largest gradient in place of the root mean square (Kingma and Ba 2015). As `torch.optim.Adamax`.

    Parameters
    ----------
    lr : float or callable, default 2e-3
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
        `weight_decay` and each of `betas` may be such functions, too. `groups`: see `Optimizer`.
    betas : (float, float), default (0.9, 0.999)
        Decay of the mean of the gradient, and of its largest absolute value, in [0, 1).
    eps : float, default 1e-8
        Added to the gradient's absolute value, greater than 0.
    weight_decay : float, default 0
        L2 penalty: adds ``weight_decay * w`` to the gradient of every parameter.
    """

    lr: LearningRate = 2e-3
    betas: tuple[Scheduled, Scheduled] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(eps="(0, inf)")

    @property
    def kind(self) -> str:
        return "adamax"

    def _entries(self, t: Any, lr: Any, h: Any) -> tuple[Any, ...]:
        beta1, beta2 = h.betas
        (correction,) = at_step(_mean, t, beta1)
        return lr / correction, h.weight_decay, 0.0, 1.0 - beta1, beta2, self.eps


def _decay(optimizer: NAdam | RAdam, lr: Any, weight_decay: Any) -> tuple[Any, Any]:
    """The weight decay as an L2 penalty, and what a step multiplies the weights by."""
    return (0.0, 1.0 - lr * weight_decay) if optimizer.decoupled_weight_decay else (weight_decay, 1.0)


def _mean(t: np.ndarray, beta1: Any) -> tuple[np.ndarray]:
    return (1.0 - power(beta1, t),)


def _rectified(t: np.ndarray, beta1: Any, beta2: Any) -> tuple[np.ndarray, np.ndarray]:
    """What a step m / (sqrt(v) + eps), or m alone, is multiplied by; and 1 where it is the first, else 0."""
    root, ratio = bias(t, beta1, beta2)
    decayed = power(beta2, t)
    longest = 2.0 / (1.0 - beta2) - 1.0
    length = longest - 2.0 * t * decayed / (1.0 - decayed)  # of the mean that v approximates
    known = length > 5.0
    with np.errstate(all="ignore"):
        share = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
        rectified = np.sqrt(np.where(known, share, 1.0)) * ratio
    return np.where(known, rectified, ratio / root), known.astype(np.float64)


def _nesterov(t: np.ndarray, beta1: Any, beta2: Any, decay: float, schedule: Scheduled) -> tuple[np.ndarray, ...]:
    """sqrt(1 - beta2^t), and that times what the gradient and the mean gradient are multiplied by.

    `beta1` holds at steps `t`; `schedule` is what it was before them.
    """
    root = np.sqrt(1.0 - power(beta2, t))
    product = _product(schedule, decay, t)
    now, next_ = beta1 * _fallen(decay, t), beta1 * _fallen(decay, t + 1)
    return root, root * (1.0 - now) / (1.0 - product), root * next_ / (1.0 - product * next_)


def _fallen(decay: float, t: np.ndarray) -> np.ndarray:
    return 1.0 - 0.5 * power(real_power(np.array([0.96]), decay).item(), t)


def _product(beta1: Scheduled, decay: float, t: np.ndarray) -> np.ndarray:
    """The products of the momenta of updates 1 .. t, for ascending `t`; 0 where next to nothing is left of one."""
    if not len(t):
        return np.zeros(0)
    first, last, so_far = int(t[0]), int(t[-1]), np.ones(1)
    products = np.zeros(last + 1 - first)
    for begin in range(1, last + 1, 1024):
        steps = np.arange(begin, begin + 1024)
        momenta = per_step("betas[0]", beta1, "[0, 1)", begin - 1, min(1024, last + 1 - begin))
        steps = steps[: len(momenta)]
        so_far = np.cumprod(np.concatenate([so_far[-1:], momenta * _fallen(decay, steps)]))[1:]
        mine = (steps >= first) & (steps <= last)
        products[steps[mine] - first] = so_far[mine]
        if so_far[-1] < _GONE:
            break
    return products[t - first]
