"""Schedules: the learning rate as a function of the updates made so far, for ``SGD(lr=schedule)``.

Momentum, betas, weight decay and dropout take them too, with what they are to begin with in the place of `lr`.

Names, parameters and values are those of `torch.optim.lr_scheduler`, stepped after every update. Where torch takes an
optimiser, a schedule takes the learning rate `lr` itself, and step is what torch calls epoch. A schedule is a
declaration: frozen, comparable, without state, and it can be saved with a trainer. It is a function of the step, so a
fit can go on anywhere. `ReduceLROnPlateau` alone reacts to what happened: it is a function of the history.

`Schedule.rates` evaluates many steps at once, by the functions of `fastmb._arithmetic`, whose bits do not depend on how
many those are; calling a schedule for one step reads from a block of them.
"""

from __future__ import annotations

from .base import FactorSchedule, Schedule
from .combined import ChainedScheduler, SequentialLR, WarmUp
from .cycles import CosineAnnealingWarmRestarts, CyclicLR, OneCycleLR
from .factors import ConstantLR, CosineAnnealingLR, ExponentialLR, LinearLR, MultiStepLR, PolynomialLR, StepLR
from .plateau import ReduceLROnPlateau

__all__ = [
    "SCHEDULES",
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "FactorSchedule",
    "LinearLR",
    "MultiStepLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "Schedule",
    "SequentialLR",
    "StepLR",
    "WarmUp",
]

SCHEDULES: dict[str, type[Schedule | ReduceLROnPlateau]] = {
    cls.__name__: cls
    for cls in (
        ConstantLR,
        LinearLR,
        StepLR,
        MultiStepLR,
        ExponentialLR,
        PolynomialLR,
        CosineAnnealingLR,
        CosineAnnealingWarmRestarts,
        CyclicLR,
        OneCycleLR,
        SequentialLR,
        ChainedScheduler,
        WarmUp,
        ReduceLROnPlateau,
    )
}
