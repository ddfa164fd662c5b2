"""Adam and AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Optimizer, Scheduled, at_step, bias, declaration


@declaration
@dataclass(frozen=True, repr=False)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015). As `torch.optim.Adam`.

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
    amsgrad : bool, default False
        Divide by the root of the largest mean square so far (Reddi et al. 2018).
    """

    betas: tuple[Scheduled, Scheduled] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0
    amsgrad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(eps="(0, inf)")

    @property
    def kind(self) -> str:
        return "amsgrad" if self.amsgrad else "adam"

    def _entries(self, t: Any, lr: Any, h: Any) -> tuple[Any, ...]:
        beta1, beta2 = h.betas
        root, ratio = at_step(bias, t, beta1, beta2)
        l2, shrink = self._decay(lr, h.weight_decay)
        return lr * ratio, l2, shrink, 1.0 - beta1, beta2, 1.0 - beta2, self.eps * root

    def _decay(self, lr: Any, weight_decay: Any) -> tuple[Any, Any]:  # noqa: ARG002
        """The weight decay as an L2 penalty, and what a step multiplies the weights by."""
        return weight_decay, 1.0


@declaration
@dataclass(frozen=True, repr=False)
class AdamW(Adam):
    """Adam with decoupled weight decay, ``w *= 1 - lr * weight_decay`` (Loshchilov and Hutter 2019).

    As `torch.optim.AdamW`. The parameters are those of `Adam`, but `weight_decay` is 0.01 unless given.
    """

    weight_decay: Scheduled = 1e-2

    def _decay(self, lr: Any, weight_decay: Any) -> tuple[Any, Any]:
        return 0.0, 1.0 - lr * weight_decay
