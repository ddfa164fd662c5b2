"""Optimisers: hyper-parameters, and the scalar arithmetic of a step. The executors update the weights.

Names, defaults and semantics are those of `torch.optim`. `fastmb.optim.base` says what all have and which update each
kind is. A new optimiser whose update is elementwise is a class, a row in `KINDS`, and the update's formula in
csrc/update.inc and in the reference executor.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .._errors import unknown_name
from .adam import Adam, AdamW
from .base import KINDS, LearningRate, Optimizer
from .sgd import SGD

if TYPE_CHECKING:
    from .adamlike import Adamax, NAdam, RAdam
    from .adaptive import Adadelta, Adagrad, RMSprop
    from .lion import Lion
    from .matrices import Adafactor, Muon

    OPTIMIZERS: dict[str, type[Optimizer]]

__all__ = [
    "KINDS",
    "OPTIMIZERS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "LearningRate",
    "Lion",
    "Muon",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "get",
]

_MODULES = {  # imported when first used
    "SGD": "sgd",
    "Adam": "adam",
    "AdamW": "adam",
    "NAdam": "adamlike",
    "RAdam": "adamlike",
    "Adamax": "adamlike",
    "RMSprop": "adaptive",
    "Adagrad": "adaptive",
    "Adadelta": "adaptive",
    "Lion": "lion",
    "Adafactor": "matrices",
    "Muon": "matrices",
}
NAMES = {name.lower(): name for name in _MODULES}


def get(optimizer: str | Optimizer) -> Optimizer:
    """The optimiser called so, with its defaults; an `Optimizer` is returned as it is."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    if not isinstance(optimizer, str):
        raise TypeError(f"optimizer must be a name or an Optimizer such as Adam(lr=1e-3); got {optimizer!r}")
    if optimizer not in NAMES:
        raise unknown_name("optimizer", optimizer, NAMES)
    return _load(NAMES[optimizer])()


def _load(name: str) -> type[Optimizer]:
    found: type[Optimizer] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return found


def __getattr__(name: str) -> object:
    if name == "OPTIMIZERS":
        return {short: _load(full) for short, full in NAMES.items()}
    if name in _MODULES:
        return _load(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
