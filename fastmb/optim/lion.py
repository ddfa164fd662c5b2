"""Lion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import LearningRate, Optimizer, Scheduled, declaration


@declaration
@dataclass(frozen=True, repr=False)
class Lion(Optimizer):
    """Lion (Chen et al. 2023): ``w -= lr (sign((1 - beta1) g + beta1 m) + weight_decay w)``.

    The momentum is ``m = beta2 m + (1 - beta2) g``, after the step. A step changes each weight by lr: it takes a lr
    3 to 10 times smaller, and a weight decay as much larger, than AdamW.

    Parameters
    ----------
    lr : float or callable, default 1e-4
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
        `weight_decay` and each of `betas` may be such functions, too. `groups`: see `Optimizer`.
    betas : (float, float), default (0.9, 0.99)
        How much of the momentum is in the step, and its decay, in [0, 1).
    weight_decay : float, default 0
        Decoupled, as in `AdamW`.
    """

    lr: LearningRate = 1e-4
    betas: tuple[Scheduled, Scheduled] = (0.9, 0.99)
    weight_decay: Scheduled = 0.0

    @property
    def kind(self) -> str:
        return "lion"

    def _entries(self, t: Any, lr: Any, h: Any) -> tuple[Any, ...]:  # noqa: ARG002
        beta1, beta2 = h.betas
        return lr, 0.0, 1.0 - lr * h.weight_decay, 1.0 - beta1, beta1, 1.0 - beta2, beta2
