"""Optimisers that look at whole weight matrices: Muon, Adafactor. They run step by step, each after its gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import sqrt
from typing import Any, ClassVar

import numpy as np

from .._arithmetic import real_power
from .._checks import integer, number
from .._errors import unknown_name
from .adam import AdamW
from .base import COLUMNS, KINDS, LearningRate, Optimizer, Scheduled, at_step, check_end, declaration

_ADJUSTMENTS = ("original", "match_rms_adamw")


@declaration
@dataclass(frozen=True, repr=False)
class Muon(Optimizer):
    """Momentum, orthogonalised, for weight matrices; AdamW for all else (Jordan et al. 2024). As `torch.optim.Muon`.

    The momentum of a matrix is replaced by the orthogonal matrix next to it, U V' of its U S V', or nearly so: by
    Newton and Schulz's iteration, X <- a X + (b X X' + c (X X')^2) X, in the network's dtype (torch's is bfloat16).
    Biases are updated by AdamW, and so is what `adamw_names` says: the inventors leave the first and the last layer
    to it.

    Parameters
    ----------
    lr : float or callable, default 1e-3
        Learning rate of matrices, or a function of the number of updates made so far (from 0), such as one of
        `fastmb.schedules`. `weight_decay`, `momentum`, `adamw_lr`, `adamw_weight_decay` and each of `adamw_betas` may
        be such functions, too. `groups`: see `Optimizer`; factors hold for AdamW's parameters as well.
    weight_decay : float, default 0.1
        Decoupled: ``w *= 1 - lr * weight_decay``.
    momentum : float, default 0.95
        In [0, 1).
    nesterov : bool, default True
        Nesterov's momentum.
    ns_coefficients : (float, float, float), default (3.4445, -4.775, 2.0315)
        a, b and c.
    eps : float, default 1e-7
        The least norm that a matrix is divided by before the iteration, greater than 0.
    ns_steps : int, default 5
        Iterations, fewer than 100.
    adjust_lr_fn : {"original", "match_rms_adamw"}, optional
        What the step of a matrix [in, out] is multiplied by: sqrt(max(1, out / in)), the default, or
        0.2 sqrt(max(in, out)), with which it is as large as AdamW's (Liu et al. 2025).
    adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay
        AdamW's hyper-parameters; default 1e-3, (0.9, 0.999), 1e-8 and 0.01.
    adamw_names : sequence of str, default ()
        Patterns (`fnmatch`) of names of weight matrices that AdamW is to update.

    Examples
    --------
    >>> import fastmb as mb
    >>> X, y = mb.datasets.load_digits()
    >>> net = mb.mlp([64, 64, 64, 10])  # weights 0.weight, 2.weight, 4.weight
    >>> muon = mb.Muon(lr=0.02, weight_decay=0.01, adamw_names=["0.*", "4.*"])
    >>> trainer = mb.Trainer(net, optimizer=muon, input_scale=1 / 16)
    >>> history = trainer.fit(X, y, max_epochs=5, verbose=0)
    >>> trainer.evaluate(X, y)["accuracy"] > 0.95
    True
    """

    weight_decay: Scheduled = 0.1
    momentum: Scheduled = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: str | None = None
    adamw_lr: LearningRate = 1e-3
    adamw_betas: tuple[Scheduled, Scheduled] = (0.9, 0.999)
    adamw_eps: float = 1e-8
    adamw_weight_decay: Scheduled = 1e-2
    adamw_names: tuple[str, ...] = ()

    fused: ClassVar[bool] = False
    most_dimensions: ClassVar[int | None] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(eps="(0, inf)")
        object.__setattr__(self, "ns_steps", integer("ns_steps", self.ns_steps, 1, 99))
        if self.adjust_lr_fn not in (None, *_ADJUSTMENTS):
            raise unknown_name("adjust_lr_fn", self.adjust_lr_fn, _ADJUSTMENTS)
        try:
            a, b, c = self.ns_coefficients
        except (TypeError, ValueError):
            raise TypeError(f"ns_coefficients must be three numbers; got {self.ns_coefficients!r}") from None
        checked = tuple(number(f"ns_coefficients[{i}]", x, "(-inf, inf)") for i, x in enumerate((a, b, c)))
        object.__setattr__(self, "ns_coefficients", checked)
        names = self.adamw_names
        if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"adamw_names must be a sequence of patterns such as ['0.*']; got {names!r}")
        object.__setattr__(self, "adamw_names", tuple(names))
        try:
            adamw = self._adamw
        except (TypeError, ValueError) as error:
            raise type(error)(f"adamw_{error}") from None
        if adamw.reacts:
            raise TypeError(f"adamw_lr must be a number or a function of the step; got {adamw.lr!r}")
        for name in ("lr", "betas", "eps", "weight_decay"):
            object.__setattr__(self, f"adamw_{name}", getattr(adamw, name))

    @property
    def _adamw(self) -> AdamW:
        """What updates the parameters that are no matrices."""
        groups = {
            pattern: {name: factor for name, factor in factors if name != "momentum"}
            for pattern, factors in self.groups
        }
        return AdamW(self.adamw_lr, self.adamw_betas, self.adamw_eps, self.adamw_weight_decay, groups=groups)

    @property
    def kind(self) -> str:
        return "muon"

    @property
    def n_states(self) -> int:
        return KINDS["adam"]  # of matrices only the first is used

    def state_kinds(self, parameters: Mapping[str, np.ndarray]) -> dict[str, str]:
        return {name: "adam" if self._is_adamws(name, w) else self.kind for name, w in parameters.items()}

    def _is_adamws(self, name: str, w: np.ndarray) -> bool:
        """Whether AdamW updates the parameter called `name`."""
        return w.ndim < 2 or any(fnmatchcase(name, pattern) for pattern in self.adamw_names)

    def parameter_groups(self, names: Iterable[str]) -> dict[str, int]:
        names = list(names)
        for pattern in self.adamw_names:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"adamw_names: {pattern!r} matches no parameter; there are {', '.join(names)}")
        return super().parameter_groups(names)

    @cached_property
    def constant(self) -> bool:
        return super().constant and self._adamw.constant

    def check_length(self, steps: int) -> None:
        super().check_length(steps)
        for name, schedule in {"lr": self.adamw_lr, **self._adamw.schedules}.items():
            check_end(f"adamw_{name}", schedule, steps)

    def coefficients(self, t0: int, n: int, lrs: np.ndarray) -> np.ndarray:
        """As `Optimizer.coefficients`, and then those of AdamW, float64 ``(n, 16 n_groups)``."""
        adamw = self._adamw
        others = adamw.coefficients(t0, n, adamw.learning_rates(t0, n))
        return np.concatenate([super().coefficients(t0, n, lrs), others], axis=1)

    def of_group(self, row: np.ndarray, group: int) -> list[float]:
        second = COLUMNS * self.n_groups
        return super().of_group(row, group) + super().of_group(row[second:], group)

    def _entries(self, t: Any, lr: Any, h: Any) -> tuple[Any, ...]:  # noqa: ARG002
        return lr, 1.0 - lr * h.weight_decay, h.momentum, 1.0 - h.momentum

    def update(self, name: str, c: list[float], w: np.ndarray, g: np.ndarray, states: np.ndarray) -> None:
        if self._is_adamws(name, w):
            from ..executors.reference import update

            update("adam", c[COLUMNS:], w, g, states)
            return
        m = states[0]
        m += c[3] * (g - m)
        step = orthogonalized(g + c[2] * (m - g) if self.nesterov else m, self.ns_coefficients, self.eps, self.ns_steps)
        n_in, n_out = w.shape
        size = 0.2 * sqrt(max(n_in, n_out)) if self.adjust_lr_fn == "match_rms_adamw" else sqrt(max(1.0, n_out / n_in))
        w *= c[1]
        w -= c[0] * size * step


@declaration
@dataclass(frozen=True, repr=False)
class Adafactor(Optimizer):
    """Steps divided by the root of the mean square, of which only the means over rows and columns are kept.

    Of Shazeer and Stern (2018). As `torch.optim.Adafactor`.

    Parameters
    ----------
    lr : float or callable, default 1e-2
        Learning rate, or a function of the number of updates made so far (from 0), such as one of `fastmb.schedules`.
        A step's size relative to the weights' is the smaller of it and 1 / sqrt(updates). `weight_decay` may be such
        functions, too. `groups`: see `Optimizer`.
    beta2_decay : float, default -0.8
        The means take ``t ** beta2_decay`` of the new at update t; from -1 to 0.
    eps : (float or None, float), default (None, 1e-3)
        The least root of a mean square (None: the dtype's precision), and the least size of the weights.
    d : float, default 1
        The largest root mean square of a step before it is multiplied by the rate, at least 1.
    weight_decay : float, default 0
        Decoupled: ``w *= 1 - lr * weight_decay``.

    Notes
    -----
    The state has the shape of two arrays of the parameters' size. The means of a matrix fill only the beginning of its
    place, and what is never touched takes no memory.
    """

    lr: LearningRate = 1e-2
    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0
    weight_decay: Scheduled = 0.0

    fused: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(beta2_decay="[-1, 0]", d="[1, inf)")
        try:
            eps1, eps2 = self.eps
        except (TypeError, ValueError):
            raise TypeError(f"eps must be two numbers, or None and a number; got {self.eps!r}") from None
        eps1 = None if eps1 is None else number("eps[0]", eps1, "[0, inf)")
        object.__setattr__(self, "eps", (eps1, number("eps[1]", eps2, "[0, inf)")))

    @property
    def kind(self) -> str:
        return "adafactor"

    @property
    def n_states(self) -> int:
        return 2

    def _entries(self, t: Any, lr: Any, h: Any) -> tuple[Any, ...]:
        most, fresh = at_step(_falling, t, -self.beta2_decay)
        return (np.minimum(lr, most) if isinstance(lr, np.ndarray) else min(lr, most)), 1.0 - lr * h.weight_decay, fresh

    def update(self, name: str, c: list[float], w: np.ndarray, g: np.ndarray, states: np.ndarray) -> None:  # noqa: ARG002
        eps1 = float(np.finfo(w.dtype).eps) if self.eps[0] is None else self.eps[0]
        size = max(self.eps[1], _root_mean_square(w)) * c[0]
        w *= c[1]
        squares = g * g
        if w.ndim == 2:
            n_in, n_out = w.shape
            over_in, over_out = states[0].reshape(-1)[:n_out], states[1].reshape(-1)[:n_in]
            over_in += c[2] * (squares.mean(axis=0) - over_in)
            over_out += c[2] * (squares.mean(axis=1) - over_out)
            squares = over_out[:, None] * (over_in / max(float(over_in.mean()), eps1))
        else:
            states[0] += c[2] * (squares - states[0])
            squares = states[0]
        step = g / np.sqrt(np.maximum(squares, eps1 * eps1))
        w -= size / max(1.0, _root_mean_square(step) / self.d) * step


def _falling(t: np.ndarray, exponent: float) -> tuple[np.ndarray, np.ndarray]:
    """1 / sqrt(t), and t^-exponent."""
    return 1.0 / np.sqrt(t), real_power(1.0 / t, exponent)


def _root_mean_square(a: np.ndarray) -> float:
    return sqrt(float(np.square(a, dtype=np.float64).mean()))


def orthogonalized(g: np.ndarray, coefficients: tuple[float, float, float], eps: float, steps: int) -> np.ndarray:
    """The orthogonal matrix next to `g`, nearly: `steps` of Newton and Schulz's iteration (of its smaller side)."""
    from ..executors import default_name
    from ..ops import matmul

    backend = default_name()  # whatever `use_backend` says: a training's bits don't follow from where it is called
    a, b, c = coefficients
    wide = g if g.shape[0] <= g.shape[1] else g.T
    x = np.ascontiguousarray(wide) / g.dtype.type(max(sqrt(float(np.square(g, dtype=np.float64).sum())), eps))
    for _ in range(steps):
        gram = matmul(x, x, transpose_b=True, backend=backend)
        x = a * x + matmul(b * gram + c * matmul(gram, gram, backend=backend), x, backend=backend)
    return x if wide is g else x.T
