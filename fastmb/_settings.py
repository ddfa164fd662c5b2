"""The part of a `Trainer` that takes other settings after it was made, or refuses them.

`assignable` makes a trainer's arguments assignable; what is assigned has to pass a new trainer's checks, and to leave a
state, and an epoch, that training can go on with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .data import copy_in

if TYPE_CHECKING:
    from .trainer import Trainer

#: Settings on which the mini-batches of an epoch depend.
OF_AN_EPOCH = ("batch_size", "accumulate_steps", "shuffle", "drop_last", "seed", "sampling", "gradient_stats")
_OF_THE_OPTIMIZER = ("lr", "groups", "momentum", "dampening", "weight_decay", "nesterov", "betas", "eps")


def assignable(cls: type[Trainer]) -> type[Trainer]:
    """The class, its arguments assignable; what its optimiser has instead says so."""
    for name in ("net", "state", *settings(cls)):
        setattr(cls, name, _Setting(name))
    for name in _OF_THE_OPTIMIZER:
        setattr(cls, name, _OfOptimizer(name))
    return cls


def settings(cls: type[Trainer]) -> tuple[str, ...]:
    """The arguments of a trainer but for its network."""
    return ("loss", "optimizer", *(cls.__init__.__kwdefaults__ or ()))


def _change(trainer: Trainer, name: str, value: Any) -> None:
    """Give a setting another value, if a new trainer would take it, and state and epoch can go on with it."""
    from .averaging import averaged_alike
    from .trainer import Trainer

    if name == "net":
        raise AttributeError("net can't be replaced, only its weights: make a new Trainer of the other network")
    if name == "state":
        with trainer._lock:
            copy_in(value, trainer.state, name)
        return
    with trainer._lock:
        trainer._check_own_weights()
        old = {each: vars(trainer)[each] for each in settings(Trainer)}
        new = Trainer(trainer.net, **old | {name: value})
        shown, instead = f"{name} can't become {value!r}: ", "make a new Trainer of the net"
        goes_on = name == "optimizer" and all(
            getattr(old[name], what) == getattr(new.optimizer, what) for what in ("kind", "n_states", "groups")
        )
        if trainer._under_way and not goes_on:
            raise RuntimeError(
                f"{shown}fit() of this trainer is under way; it takes an optimizer of the same kind, with the same "
                "groups, and nothing else (schedules change with the updates)"
            )
        if trainer._current is not None and name in OF_AN_EPOCH and vars(new)[name] != old[name]:
            raise ValueError(f"{shown}an epoch is under way; finish it with fit(), or {instead}")
        ours, theirs = (each.optimizer.state_kinds(trainer.net.parameters()) for each in (trainer, new))
        same = ours == theirs and trainer.state.shape == new.state.shape
        if trainer.t and not (same and averaged_alike(trainer.average, new.average, trainer.t, trainer.epoch)):
            raise ValueError(f"{shown}it needs another state than {trainer.t} updates have left; {instead}")
        if name == "optimizer" and new.optimizer.lr is not trainer.optimizer.lr:
            trainer._since = trainer.epoch
        anew = not same or (name == "optimizer" and trainer._is_fresh())
        vars(trainer)[name] = vars(new)[name]
        trainer._ahead = trainer._standing = None
        if anew:
            trainer._build(None)
        elif name != "optimizer" or not trainer.optimizer.fused or trainer.optimizer.groups != old[name].groups:
            trainer._executor = trainer._executor_for(trainer.loss)


class _Setting:
    """An argument of a `Trainer` that is assigned to later. Read like any attribute."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __set__(self, trainer: Trainer, value: Any) -> None:
        if "_executor" in vars(trainer):
            _change(trainer, self._name, value)
        else:
            vars(trainer)[self._name] = value


class _OfOptimizer:
    """What a trainer doesn't have, but its optimiser: whoever looks for it is told."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, trainer: Trainer | None, cls: type[Trainer]) -> Any:
        raise AttributeError(f"a Trainer has no {self._name!r}; its optimizer may have: trainer.optimizer.{self._name}")

    def __set__(self, trainer: Trainer, value: Any) -> None:
        made = f"{type(trainer.optimizer).__name__}({self._name}={value!r}, ...)"
        raise AttributeError(f"a Trainer has no {self._name!r}; its optimizer may have: trainer.optimizer = {made}")
