"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Optimizer, Scheduled, declaration


@declaration
@dataclass(frozen=True, repr=False)
class SGD(Optimizer):
    """Stochastic gradient descent, with momentum if asked for. As `torch.optim.SGD`.

    Parameters
    ----------
    lr : float or callable, default 1e-3
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
        `weight_decay` and `momentum` may be such functions, too. `groups`: see `Optimizer`.
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

    momentum: Scheduled = 0.0
    dampening: float = 0.0
    weight_decay: Scheduled = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(dampening="[0, 1]")
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

    def _entries(self, t: Any, lr: Any, h: Any) -> tuple[Any, ...]:
        return lr, h.weight_decay, h.momentum, 1.0 - self.dampening * ((t > 1) * (h.momentum != 0))
