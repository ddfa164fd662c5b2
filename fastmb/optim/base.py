"""What all optimisers have: checked hyper-parameters, schedules of them, groups of parameters, rows of coefficients.

All that doesn't depend on a weight (bias corrections, decays, schedules) is computed here and in the optimisers, in
float64, with + - * / and sqrt alone, so that it is the same number on every machine. `Optimizer.coefficients` turns
the steps to come into rows of coefficients c0 .. c7, and an executor applies, to each weight w with gradient g, what
belongs to `kind`:

- sgd:       ``g += c1 w; w -= c0 g``
- momentum:  ``g += c1 w; m = c2 m + c3 g; w -= c0 m``
- nesterov:  ``g += c1 w; m = c2 m + c3 g; w -= c0 (g + c2 m)``
- adam:      ``g += c1 w; w *= c2; m += c3 (g - m); v = c4 v + c5 g^2; w -= c0 m / (sqrt(v) + c6)``
- amsgrad:   as adam, with ``x = max(x, v)`` and sqrt(x)
- nadam:     as adam, with ``w -= (c7 g + c0 m) / (sqrt(v) + c6)``
- radam:     as adam, with ``w -= c0 m / (c7 sqrt(v) + c6)``
- adamax:    ``g += c1 w; m += c3 (g - m); u = max(c4 u, |g| + c5); w -= c0 m / u``
- rmsprop:   ``g += c1 w; v = c2 v + c3 g^2; w -= c0 g / (sqrt(v) + c4)``; centered: ``a += c3 (g - a)`` and
  ``sqrt(max(v - a^2, 0))``; with momentum: ``b = c5 b + g / (...); w -= c0 b``
- adagrad:   ``g += c1 w; s += g^2; w -= c0 g / (sqrt(s) + c2)``
- adadelta:  ``g += c1 w; v = c2 v + c3 g^2; x = g sqrt(d + c4) / sqrt(v + c4); d = c2 d + c3 x^2; w -= c0 x``
- lion:      ``g += c1 w; w *= c2; w -= c0 sign(c3 g + c4 m); m = c5 g + c6 m``
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import FrozenInstanceError, dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import numpy as np

from .._arithmetic import power
from .._checks import boolean, number, number_or_schedule, per_step
from .._errors import unknown_name

KINDS = {  # kind -> arrays of state, each as large as the parameters, in the order of the executors
    "sgd": 0,
    "momentum": 1,  # m
    "nesterov": 1,  # m
    "adam": 2,  # m, v
    "amsgrad": 3,  # m, v, x
    "nadam": 2,  # m, v
    "radam": 2,  # m, v
    "adamax": 2,  # m, u
    "rmsprop": 1,  # v
    "rmsprop_momentum": 2,  # v, b
    "rmsprop_centered": 2,  # v, a
    "rmsprop_centered_momentum": 3,  # v, a, b
    "adagrad": 1,  # s
    "adadelta": 2,  # v, d
    "lion": 1,  # m
}
COLUMNS = 8  # coefficients of a step
_ZEROS = (0.0,) * COLUMNS
FACTORS = {"lr": "[0, inf)", "weight_decay": "[0, inf)", "momentum": "[0, 1]"}  # what a group may multiply, by how much

LearningRate = float | Callable[[int], float]
Scheduled = float | Callable[[int], float]
_AnOptimizer = TypeVar("_AnOptimizer", bound="Optimizer")


def _refuse(optimizer: Optimizer, name: str, value: Any) -> None:
    raise FrozenInstanceError(
        "an optimizer can't be changed: give its trainer another one, which goes on from the same state, "
        f"trainer.optimizer = {type(optimizer).__name__}({name}={value!r}, ...)"
    )


def declaration(cls: type[_AnOptimizer]) -> type[_AnOptimizer]:
    """An optimiser's frozen dataclass, with words of its own for who assigns to what it holds."""
    cls.__setattr__ = _refuse  # type: ignore[assignment,method-assign]
    return cls


@dataclass(frozen=True, repr=False)
class Optimizer:
    """What all optimisers have. They are declarations: two equal ones do the same, the state lives in the trainer.

    Parameters
    ----------
    lr : float or callable
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
        `weight_decay`, `momentum` and `betas` of those that have them take such functions, too.
    groups : mapping or sequence of pairs, default ()
        Factors for parameters by name: ``{"*.bias": {"weight_decay": 0}, "0.*": {"lr": 0.1}}``. A pattern is one of
        `fnmatch`, over the names of ``net.parameters()``; of several that match a name, the first holds. The numbers
        multiply the optimiser's own ``lr``, ``weight_decay`` and ``momentum`` (this by at most 1); what isn't named
        stays. An lr of 0 freezes parameters.
    """

    lr: LearningRate = 1e-3
    groups: Any = field(default=(), kw_only=True)  # a tuple of (pattern, ((name, factor), ...))

    fused: ClassVar[bool] = True  # the executors have its update, elementwise; else `update` is called
    most_dimensions: ClassVar[int | None] = None  # that a parameter may have; None: any number
    intervals: ClassVar[dict[str, str]] = {"lr": "[0, inf)", "momentum": "[0, 1)", "weight_decay": "[0, inf)"}

    def __post_init__(self) -> None:
        for name, interval in self.intervals.items():
            if hasattr(self, name) and not (name == "lr" and self.reacts):
                object.__setattr__(self, name, number_or_schedule(name, getattr(self, name), interval))
        if hasattr(self, "betas"):
            object.__setattr__(self, "betas", _betas(self.betas))
        for flag in fields(self):
            if isinstance(flag.default, bool):
                object.__setattr__(self, flag.name, boolean(flag.name, getattr(self, flag.name)))
        object.__setattr__(self, "groups", self._checked_groups())

    def __repr__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "groups"]
        shown += [f"groups={ {pattern: dict(factors) for pattern, factors in self.groups}!r}"] * bool(self.groups)
        return f"{type(self).__name__}({', '.join(shown)})"

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

    def state_kinds(self, parameters: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Of which kind the state of each of `parameters` is: only an optimiser of the same can go on with it."""
        return dict.fromkeys(parameters, self.kind)

    @property
    def initial_state(self) -> float:
        """What the state is filled with before the first step."""
        return 0.0

    def init_state(self, state: np.ndarray) -> None:
        """Fill `state`, ``(n_states, size)``, as it is before the first step."""
        state.fill(self.initial_state)

    # ---- groups --------------------------------------------------------------------------------------------------

    def _checked_groups(self) -> tuple[tuple[str, tuple[tuple[str, float], ...]], ...]:
        """`groups` as pairs of a pattern and pairs of a name and a factor."""
        try:
            given = self.groups.items() if isinstance(self.groups, Mapping) else self.groups
            pairs = [(pattern, dict(factors)) for pattern, factors in given]
            right = all(isinstance(pattern, str) for pattern, _ in pairs)
        except (TypeError, ValueError):
            right = False
        if not right:
            raise TypeError(
                "groups must map patterns of names to factors, such as {'*.bias': {'weight_decay': 0}}; "
                f"got {self.groups!r}"
            )
        known = [name for name in FACTORS if hasattr(self, name)]
        found: dict[str, tuple[tuple[str, float], ...]] = {}
        for pattern, factors in pairs:
            if pattern in found:
                raise ValueError(f"groups has the pattern {pattern!r} twice")
            for name in factors:
                if name not in known:
                    raise unknown_name(f"groups[{pattern!r}]: a factor", name, known)
            found[pattern] = tuple(
                (name, number(f"groups[{pattern!r}][{name!r}]", factor, FACTORS[name]))
                for name, factor in sorted(factors.items())
            )
        return tuple(found.items())

    @cached_property
    def n_groups(self) -> int:
        """Rows of coefficients a step: one for parameters that no pattern matches, and one for each pattern."""
        return 1 + len(self.groups)

    def parameter_groups(self, names: Iterable[str]) -> dict[str, int]:
        """Which row of coefficients each of the parameters `names` takes.

        Raises
        ------
        ValueError
            If there is a pattern that matches none of them, or none that an earlier one hasn't taken.
        """
        names = list(names)
        patterns = [pattern for pattern, _ in self.groups]
        matches = [[name for name in names if fnmatchcase(name, pattern)] for pattern in patterns]
        found = dict.fromkeys(names, 0)
        for i in reversed(range(len(patterns))):
            found |= dict.fromkeys(matches[i], i + 1)
        for i, pattern in enumerate(patterns):
            if not matches[i]:
                raise ValueError(f"groups: {pattern!r} matches no parameter; there are {', '.join(names)}")
            if i + 1 not in found.values():
                raise ValueError(f"groups: all that {pattern!r} matches is taken by patterns before it")
        return found

    # ---- what varies ---------------------------------------------------------------------------------------------

    @cached_property
    def reacts(self) -> bool:
        """Whether the learning rate follows from a trainer's history: a `ReduceLROnPlateau`."""
        return hasattr(type(self.lr), "monitor")

    def learning_rates(self, t0: int, n: int) -> np.ndarray:
        """The learning rates of the `n` steps after `t0`, float64 ``(n,)``: lr, or lr(t0), lr(t0 + 1), ..."""
        lr: Any = self.lr
        return per_step("lr", lr.lr if self.reacts else lr, self.intervals["lr"], t0, n)

    @cached_property
    def schedules(self) -> dict[str, Callable[[int], float]]:
        """The hyper-parameters that are functions of the step, but for the learning rate."""
        found = {name: getattr(self, name) for name in ("momentum", "weight_decay") if callable(getattr(self, name, 0))}
        for i, beta in enumerate(getattr(self, "betas", ())):
            if callable(beta):
                found[f"betas[{i}]"] = beta
        return found

    @cached_property
    def constant(self) -> bool:
        """Whether no hyper-parameter follows a schedule, or the history."""
        return not (self.reacts or callable(self.lr) or self.schedules)

    def check_length(self, steps: int) -> None:
        """Raise a `ValueError` if a schedule ends before `steps` updates are made."""
        for name, schedule in {"lr": self.lr, **self.schedules}.items():
            check_end(name, schedule, steps)

    def coefficients(self, t0: int, n: int, lrs: np.ndarray) -> np.ndarray:
        """The coefficients of the `n` steps after `t0`, float64 ``(n, 8 n_groups)``, for their learning rates `lrs`.

        Row j is for update number t0 + j + 1, and has c0 .. c7 of each group. One row costs Python arithmetic alone
        (unless a hyper-parameter has a schedule); it has the bits that it would have among others.
        """
        if n == 1 and not self.schedules:
            row: list[float] = []
            for at in self._by_group(lrs.item(), self):
                row += self._entries(t0 + 1, *at)
                row += _ZEROS[: -len(row) % COLUMNS]
            return np.array([row])
        rows = np.zeros((n, COLUMNS * self.n_groups))
        t = np.arange(t0 + 1, t0 + n + 1)
        for i, at in enumerate(self._by_group(lrs, self._now(t0, n))):
            for column, entry in enumerate(self._entries(t, *at), COLUMNS * i):
                rows[:, column] = entry
        return rows

    def of_group(self, row: np.ndarray, group: int) -> list[float]:
        """The coefficients of a group of parameters in one row of `coefficients`."""
        found: list[float] = row[COLUMNS * group : COLUMNS * (group + 1)].tolist()
        return found

    def update(self, name: str, c: list[float], w: np.ndarray, g: np.ndarray, states: np.ndarray) -> None:
        """The update of the parameter called `name`, `w`, and of its `states`, ``(n_states, *w.shape)``, in place.

        `g` is its gradient, and `c` are the coefficients of its group. Of optimisers that are not `fused`.
        """
        raise NotImplementedError

    def _now(self, t0: int, n: int) -> Any:
        """The hyper-parameters at the `n` steps after `t0`: arrays where they have a schedule."""
        if not self.schedules:
            return self
        now = SimpleNamespace(**vars(self))
        for name, schedule in self.schedules.items():
            if name.startswith("betas"):
                values = per_step(name, schedule, "[0, 1)", t0, n)
                now.betas = (values, now.betas[1]) if name == "betas[0]" else (now.betas[0], values)
            else:
                setattr(now, name, per_step(name, schedule, self.intervals[name], t0, n))
        return now

    def _by_group(self, lr: Any, now: Any) -> list[tuple[Any, Any]]:
        """Learning rates and hyper-parameters of what no group has, and of each of `groups`."""
        return [(lr, now)] + [self._scaled(lr, now, i) for i in range(len(self.groups))]

    def _scaled(self, lr: Any, now: Any, group: int) -> tuple[Any, Any]:
        """Learning rates and hyper-parameters of one of `groups`."""
        scaled = SimpleNamespace(**vars(now))
        for name, factor in self.groups[group][1]:
            if name == "lr":
                lr = lr * factor
            else:
                setattr(scaled, name, getattr(now, name) * factor)
        return lr, scaled

    def _entries(self, t: Any, lr: Any, h: Any) -> tuple[Any, ...]:
        """c0, c1, ... of update number `t` (from 1), with the hyper-parameters `h`: numbers in, numbers out; arrays in,
        arrays out. `h` is `self`, or what has its attributes as they are at those steps, in one of the groups.
        """
        raise NotImplementedError


def check_end(name: str, schedule: object, steps: int) -> None:
    """Raise a `ValueError` if a schedule ends before `steps` updates are made."""
    end = getattr(schedule, "end", None)
    if end is not None and end < steps:
        raise ValueError(
            f"{name}: {type(schedule).__name__} ends after {end} steps; this fit is to go on until update {steps}"
        )


def _betas(betas: Any) -> tuple[Scheduled, Scheduled]:
    try:
        beta1, beta2 = betas
    except (TypeError, ValueError):
        raise TypeError(f"betas must be two numbers in [0, 1); got {betas!r}") from None
    return number_or_schedule("betas[0]", beta1, "[0, 1)"), number_or_schedule("betas[1]", beta2, "[0, 1)")


def at_step(function: Callable[..., tuple[np.ndarray, ...]], t: Any, *arguments: Any) -> tuple[Any, ...]:
    """``function(t, *arguments)``, which is elementwise in `t`: one step, or steps one after the other. Where the
    arguments are the same at all of these, few steps are taken out of blocks that are kept.
    """
    if isinstance(t, int):
        return _listed(function, arguments, t >> 10)[t & 1023]
    if not 0 < len(t) <= 1024 or any(isinstance(argument, np.ndarray) for argument in arguments):
        return function(t, *arguments)
    first, last = int(t[0]), int(t[-1])
    blocks = [_block(function, arguments, block) for block in range(first >> 10, (last >> 10) + 1)]
    whole = blocks[0] if len(blocks) == 1 else map(np.concatenate, zip(*blocks, strict=True))
    first &= 1023
    return tuple(values[first : first + len(t)] for values in whole)


@lru_cache(maxsize=64)
def _block(function: Callable[..., tuple[np.ndarray, ...]], arguments: Any, block: int) -> tuple[np.ndarray, ...]:
    """A function of steps 1024 block .. 1024 block + 1023."""
    t = np.arange(block << 10, (block + 1) << 10)
    t[0] += t[0] == 0  # there is no step 0
    found = function(t, *arguments)
    for values in found:
        values.setflags(write=False)  # they are kept
    return found


@lru_cache(maxsize=64)
def _listed(function: Callable[..., tuple[np.ndarray, ...]], arguments: Any, block: int) -> list[tuple[float, ...]]:
    """The same, ready for steps that come one at a time."""
    return list(zip(*(values.tolist() for values in _block(function, arguments, block)), strict=True))


def bias(t: np.ndarray, beta1: Any, beta2: Any) -> tuple[np.ndarray, np.ndarray]:
    """Adam's corrections: sqrt(1 - beta2^t), and that over 1 - beta1^t."""
    root = np.sqrt(1.0 - power(beta2, t))
    return root, root / (1.0 - power(beta1, t))
