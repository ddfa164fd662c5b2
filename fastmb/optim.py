"""Optimisers: hyper-parameters, and the scalar arithmetic of a step. The executors update the weights.

All that doesn't depend on a weight (bias corrections, decays, schedules) is computed here, in float64, with + - * /
and sqrt alone, so that it is the same number on every machine. `Optimizer.coefficients` turns the steps to come into
rows of coefficients c0 .. c7, and an executor applies, to each weight w with gradient g, what belongs to `kind`:

- sgd:       ``g += c1 w; w -= c0 g``
- momentum:  ``g += c1 w; m = c2 m + c3 g; w -= c0 m``
- nesterov:  ``g += c1 w; m = c2 m + c3 g; w -= c0 (g + c2 m)``
- adam:      ``g += c1 w; w *= c2; m += c3 (g - m); v = c4 v + c5 g^2; w -= c0 m / (sqrt(v) + c6)``
- amsgrad:   as adam, with ``x = max(x, v)`` and sqrt(x)
- rmsprop:   ``g += c1 w; v = c2 v + c3 g^2; w -= c0 g / (sqrt(v) + c4)``; centered: ``a += c3 (g - a)`` and
  ``sqrt(max(v - a^2, 0))``; with momentum: ``b = c5 b + g / (...); w -= c0 b``
- adagrad:   ``g += c1 w; s += g^2; w -= c0 g / (sqrt(s) + c2)``

Names, defaults and semantics are those of `torch.optim`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ._arithmetic import power as _power
from ._checks import number
from ._errors import unknown_name

KINDS = {  # kind -> arrays of state, each as large as the parameters, in the order of the executors
    "sgd": 0,
    "momentum": 1,  # m
    "nesterov": 1,  # m
    "adam": 2,  # m, v
    "amsgrad": 3,  # m, v, x
    "rmsprop": 1,  # v
    "rmsprop_momentum": 2,  # v, b
    "rmsprop_centered": 2,  # v, a
    "rmsprop_centered_momentum": 3,  # v, a, b
    "adagrad": 1,  # s
}

LearningRate = float | Callable[[int], float]


@dataclass(frozen=True)
class Optimizer:
    """What all optimisers have. They are declarations: two equal ones do the same, the state lives in the trainer."""

    lr: LearningRate = 1e-3

    def __post_init__(self) -> None:
        if not callable(self.lr):
            self._check(lr="[0, inf)")

    def _check(self, **intervals: str) -> None:
        """Make the hyper-parameters named floats, each within its interval."""
        for name, interval in intervals.items():
            object.__setattr__(self, name, number(name, getattr(self, name), interval))

    @property
    def kind(self) -> str:
        """Which update the executors apply: one of `KINDS`."""
        raise NotImplementedError

    @property
    def n_states(self) -> int:
        """Arrays of state, each as large as the parameters."""
        return KINDS[self.kind]

    @property
    def initial_state(self) -> float:
        """What the state is filled with before the first step."""
        return 0.0

    def init_state(self, state: np.ndarray) -> None:
        """Fill `state`, ``(n_states, size)``, as it is before the first step."""
        state.fill(self.initial_state)

    def learning_rates(self, t0: int, n: int) -> np.ndarray:
        """The learning rates of the `n` steps after `t0`, float64 ``(n,)``: lr, or lr(t0), lr(t0 + 1), ..."""
        if not callable(self.lr):
            return np.array([self.lr] * n)
        if n > 1 and (many := getattr(self.lr, "rates", None)):  # a schedule: all steps at once
            rates = many(t0, n)
        else:
            rates = np.array([float(self.lr(t)) for t in range(t0, t0 + n)], dtype=np.float64)
        right = np.isfinite(rates) & (rates >= 0)
        if not right.all():
            wrong = int(right.argmin())
            raise ValueError(f"lr({t0 + wrong}) must be a finite number >= 0; got {rates[wrong].item()!r}")
        return rates

    def check_length(self, steps: int) -> None:
        """Raise a `ValueError` if the learning rate's schedule ends before `steps` updates are made."""
        end = getattr(self.lr, "end", None)
        if end is not None and end < steps:
            name = type(self.lr).__name__
            raise ValueError(f"lr: {name} ends after {end} steps; this fit is to go on until update {steps}")

    def coefficients(self, t0: int, n: int, lrs: np.ndarray) -> np.ndarray:
        """The coefficients of the `n` steps after `t0`, float64 ``(n, 8)``, for their learning rates `lrs`.

        Row j is for update number t0 + j + 1. One row costs Python arithmetic alone; it has the bits that it would
        have among others.
        """
        rows = np.zeros((n, 8))
        if n == 1:
            entries = self._entries(t0 + 1, lrs.item())
            rows[0, : len(entries)] = entries
        else:
            for column, entry in enumerate(self._entries(np.arange(t0 + 1, t0 + n + 1), lrs)):
                rows[:, column] = entry
        return rows

    def _entries(self, t: Any, lr: Any) -> tuple[Any, ...]:
        """c0, c1, ... of update number `t` (from 1): numbers in, numbers out; arrays in, arrays out."""
        raise NotImplementedError


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent, with momentum if asked for. As `torch.optim.SGD`.

    Parameters
    ----------
    lr : float or callable, default 1e-3
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
    momentum : float, default 0
        In [0, 1).
    dampening : float, default 0
        ``m = momentum m + (1 - dampening) g`` from the second step on; the first takes the whole gradient.
    weight_decay : float, default 0
        L2 penalty: adds ``weight_decay * w`` to the gradient of every parameter.
    nesterov : bool, default False
        Nesterov's momentum (Sutskever et al. 2013); needs a momentum, and no dampening.

    Examples
    --------
    >>> SGD(lr=0.1, momentum=0.9).kind
    'momentum'
    """

    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(momentum="[0, 1)", dampening="[0, 1]", weight_decay="[0, inf)")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                "nesterov takes a momentum > 0 and a dampening of 0; "
                f"got momentum={self.momentum}, dampening={self.dampening}"
            )

    @property
    def kind(self) -> str:
        if self.momentum == 0:
            return "sgd"
        return "nesterov" if self.nesterov else "momentum"

    def _entries(self, t: Any, lr: Any) -> tuple[Any, ...]:
        return lr, self.weight_decay, self.momentum, 1.0 - self.dampening * (t > 1)


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015). As `torch.optim.Adam`.

    Parameters
    ----------
    lr : float or callable, default 1e-3
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
    betas : (float, float), default (0.9, 0.999)
        Decay of the means of the gradient and of its square, in [0, 1).
    eps : float, default 1e-8
        Added to the root of the mean square, greater than 0.
    weight_decay : float, default 0
        L2 penalty: adds ``weight_decay * w`` to the gradient of every parameter.
    amsgrad : bool, default False
        Divide by the root of the largest mean square so far (Reddi et al. 2018).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(eps="(0, inf)", weight_decay="[0, inf)")
        try:
            beta1, beta2 = self.betas
        except (TypeError, ValueError):
            raise TypeError(f"betas must be two numbers in [0, 1); got {self.betas!r}") from None
        betas = number("betas[0]", beta1, "[0, 1)"), number("betas[1]", beta2, "[0, 1)")
        object.__setattr__(self, "betas", betas)

    @property
    def kind(self) -> str:
        return "amsgrad" if self.amsgrad else "adam"

    def _entries(self, t: Any, lr: Any) -> tuple[Any, ...]:
        beta1, beta2 = self.betas
        root: Any
        ratio: Any
        if isinstance(t, int):
            root, ratio = _bias_block(beta1, beta2, t >> 10)[t & 1023]
        else:
            root, ratio = _bias(beta1, beta2, t)
        l2, shrink = self._decay(lr)
        return lr * ratio, l2, shrink, 1.0 - beta1, beta2, 1.0 - beta2, self.eps * root

    def _decay(self, lr: Any) -> tuple[float, Any]:  # noqa: ARG002
        """The weight decay as an L2 penalty, and what a step multiplies the weights by."""
        return self.weight_decay, 1.0


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, ``w *= 1 - lr * weight_decay`` (Loshchilov and Hutter 2019).

    As `torch.optim.AdamW`. The parameters are those of `Adam`, but `weight_decay` is 0.01 unless given.
    """

    weight_decay: float = 1e-2

    def _decay(self, lr: Any) -> tuple[float, Any]:
        return 0.0, 1.0 - lr * self.weight_decay


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton 2012). As `torch.optim.RMSprop`.

    Parameters
    ----------
    lr : float or callable, default 1e-2
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
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
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(alpha="[0, 1)", eps="(0, inf)", weight_decay="[0, inf)", momentum="[0, 1)")

    @property
    def kind(self) -> str:
        return "rmsprop" + ("_centered" if self.centered else "") + ("_momentum" if self.momentum else "")

    def _entries(self, t: Any, lr: Any) -> tuple[Any, ...]:  # noqa: ARG002
        return lr, self.weight_decay, self.alpha, 1.0 - self.alpha, self.eps, self.momentum


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """Adagrad (Duchi, Hazan and Singer 2011). As `torch.optim.Adagrad`.

    Parameters
    ----------
    lr : float or callable, default 1e-2
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
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
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(lr_decay="[0, inf)", weight_decay="[0, inf)", initial_accumulator_value="[0, inf)", eps="(0, inf)")

    @property
    def kind(self) -> str:
        return "adagrad"

    @property
    def initial_state(self) -> float:
        return self.initial_accumulator_value

    def _entries(self, t: Any, lr: Any) -> tuple[Any, ...]:
        return lr / (1.0 + (t - 1) * self.lr_decay), self.weight_decay, self.eps


OPTIMIZERS: dict[str, type[Optimizer]] = {cls.__name__.lower(): cls for cls in (SGD, Adam, AdamW, RMSprop, Adagrad)}


def get(optimizer: str | Optimizer) -> Optimizer:
    """The optimiser called so, with its defaults; an `Optimizer` is returned as it is."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    if not isinstance(optimizer, str):
        raise TypeError(f"optimizer must be a name or an Optimizer such as Adam(lr=1e-3); got {optimizer!r}")
    if optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", optimizer, OPTIMIZERS)
    return OPTIMIZERS[optimizer]()


def _bias(beta1: float, beta2: float, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Adam's corrections: sqrt(1 - beta2^t), and that over 1 - beta1^t."""
    root = np.sqrt(1.0 - _power(beta2, t))
    return root, root / (1.0 - _power(beta1, t))


@lru_cache(maxsize=64)
def _bias_block(beta1: float, beta2: float, block: int) -> list[tuple[float, float]]:
    """`_bias` of steps 1024 block .. 1024 block + 1023, ready for steps that come one at a time."""
    t = np.arange(block << 10, (block + 1) << 10)
    t[0] += t[0] == 0  # there is no step 0
    root, ratio = _bias(beta1, beta2, t)
    return list(zip(root.tolist(), ratio.tolist(), strict=True))
