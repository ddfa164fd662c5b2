"""Copies of a trainer to try something on. They share no numbers with it, and schedules stand still in them.

A schedule is made for the training that is to come, of so many updates: what is tried makes others, and often more.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from .history import History
from .layers import Residual
from .modules import Dropout
from .schedules import ConstantLR

if TYPE_CHECKING:
    from .optim import Optimizer
    from .trainer import Trainer


def check_trainer(trainer: object) -> None:
    """Raise a `TypeError` if it isn't one."""
    from .trainer import Trainer

    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a Trainer; got {type(trainer).__name__}")


def trial(trainer: Trainer, optimizer: Optimizer, **settings: Any) -> Trainer:
    """A copy that begins an epoch, with this optimiser, other settings, and a history of its own.

    It has the optimiser's state if that is of the same kind.
    """
    with trainer._lock:
        changed = trainer.__getstate__() | settings
        rows = trainer.optimizer.n_states + (changed["average"] is not None)
        net = object.__new__(type(trainer.net))
        net.__setstate__(trainer.net.__getstate__() | {"modules": _still(trainer.net.modules, trainer.t)})
        changed |= {
            "net": net,
            "optimizer": optimizer,
            "state": trainer.state[:rows] if optimizer.kind == trainer.optimizer.kind else None,  # to be copied
            "history": History(),
            "_current": None,
            "_pending": None,
        }
        again = object.__new__(type(trainer))
        again.__setstate__(changed)
    return again


def standing(trainer: Trainer, lr: Any, **others: Any) -> Optimizer:
    """The trainer's optimiser with this learning rate, what others are named, and no schedule that moves."""
    optimizer = trainer.optimizer
    names = [field.name for field in fields(optimizer) if field.init and field.name not in ("lr", *others)]
    return replace(optimizer, lr=lr, **others, **{name: _still(getattr(optimizer, name), trainer.t) for name in names})


def present_lr(trainer: Trainer) -> float:
    """The learning rate that stands now."""
    lr: Any = trainer.optimizer.lr
    if trainer.optimizer.reacts:
        return trainer._reacted()
    return _value(lr, trainer.t) if callable(lr) else lr


def _still(part: Any, t: int) -> Any:
    """A part of a declaration, with schedules that stay at what they are after `t` updates."""
    if isinstance(part, tuple):
        return tuple(_still(each, t) for each in part)
    if isinstance(part, Residual):
        return Residual(*_still(part.modules, t))
    if isinstance(part, Dropout):
        return Dropout(_still(part.p, t))
    return ConstantLR(_value(part, t), factor=1.0) if callable(part) else part


def _value(schedule: Any, t: int) -> float:
    """A schedule's value after `t` updates; one that has ended stays at its last."""
    end = getattr(schedule, "end", None)
    return float(schedule(t if end is None else min(t, end - 1)))
