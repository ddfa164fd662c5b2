"""Losses: what is minimised, as declarations. The executors hold the loops.

With row losses l_i, sample weights s_i (1 unless given) and class weights u_i of the rows (1 but for `CrossEntropy`),
the loss of a mini-batch is ``L = sum_i s_i l_i / D`` with ``D = sum_i s_i u_i``: the mean is over the weights. The
gradient with respect to the network's raw output z is ``s_i / D dl_i/dz``, and 0 where D is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import number
from ._errors import unknown_name

if TYPE_CHECKING:
    from .functions import Function


class Loss:
    """A loss of your own: the mean over a row's outputs of f(z, y). The built-in losses are its subclasses.

    ``l = mean_c f(z_c, y_c)`` with z the network's raw outputs and y the targets. Compiled by Numba for blocks of
    numbers and run inside the training loop: ``pip install 'fastmb[numba]'``. The reference executor, ``"numpy"``,
    calls it number by number and needs no Numba.

    Parameters
    ----------
    f : callable
        ``f(z, y)``, a plain Python function of two numbers that gives a number, written with operators, ``if``, `abs`,
        `min`, `max`, functions of NumPy or `math`, and functions of that kind. It has to be finite for every z, at
        least for some y, and must raise nothing: compiled, it gives NaN there.
    df : callable, optional
        ``df(z, y)``, or ``df(z, y, f(z, y))``: its derivative with respect to z. Left out, it is found by forward-mode
        differentiation of `f`.
    task : {"regression", "multilabel"}, default "regression"
        What `Sequential.predict` gives after training: the outputs, or for each whether it is positive.

    Raises
    ------
    TypeError
        If a function takes other numbers than these, or gives no real number.
    ValueError
        If `f` isn't finite, or `df` is not its derivative: finite differences are compared at some points.

    Examples
    --------
    >>> import numpy as np
    >>> Loss(lambda z, y: np.log(np.cosh(z - y)))
    Loss(<lambda>)
    >>> def poisson(z, y):
    ...     return np.exp(z) - y * z
    >>> Loss(poisson, df=lambda z, y: np.exp(z) - y)
    Loss(poisson)
    """

    kind: str = "custom"
    task: str = "regression"  # what `predict` returns after training: "classification", "multilabel" too
    label_smoothing = 0.0
    delta = 1.0
    function: Function | None = None  # of z and y, a user's own

    def __init__(
        self, f: Callable[..., Any] | None = None, df: Callable[..., Any] | None = None, *, task: str = "regression"
    ) -> None:
        from .functions import Function

        if task not in ("regression", "multilabel"):
            raise unknown_name("task", task, ("regression", "multilabel"))
        self.function = Function(f, df, arity=2)
        self.task = task

    def __repr__(self) -> str:
        assert self.function is not None
        return (
            f"Loss({self.function.name})"
            if self.task == "regression"
            else f"Loss({self.function.name}, task={self.task!r})"
        )

    @property
    def weight(self) -> np.ndarray | None:
        """One float64 weight per output, or None for ones."""
        return None

    def check_outputs(self, n_outputs: int) -> None:
        """Raise a `ValueError` if the loss doesn't fit a network with `n_outputs` outputs."""


@dataclass(frozen=True, eq=False)
class FromOutside(Loss):
    """A gradient that somebody else has computed, as a loss: ``l = sum_c z_c g_c``, whose gradient is g. Not public."""

    kind = "linear"


@dataclass(frozen=True, eq=False)
class CrossEntropy(Loss):
    """Cross-entropy of the softmax of the outputs, for classes that exclude each other.

    ``l = -sum_c q_c log softmax(z)_c`` with ``q_c = w_c ((1 - eps) t_c + eps / C)``, t the one-hot class (or the given
    row of probabilities), w the class weights, eps the label smoothing. The weight of a row in the mean is w of its
    class for class indices, 1 for rows of probabilities. As `torch.nn.CrossEntropyLoss`.

    Parameters
    ----------
    label_smoothing : float, default 0
        eps, in [0, 1] (Szegedy et al. 2016).
    class_weight : array-like (C,), optional
        w, finite and not negative.

    Examples
    --------
    >>> CrossEntropy(label_smoothing=0.1)
    CrossEntropy(label_smoothing=0.1, class_weight=None)
    """

    kind = "cross_entropy"
    task = "classification"
    label_smoothing: float = 0.0
    class_weight: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "label_smoothing", number("label_smoothing", self.label_smoothing, "[0, 1]"))
        object.__setattr__(self, "class_weight", _weights("class_weight", self.class_weight))

    @property
    def weight(self) -> np.ndarray | None:
        weights: np.ndarray | None = self.class_weight
        return weights

    def check_outputs(self, n_outputs: int) -> None:
        if n_outputs < 2:
            raise ValueError(
                "cross_entropy takes a network with at least 2 outputs, one per class; this one has 1 "
                "(bce_with_logits tells two classes apart with one output)"
            )
        _check_length("class_weight", self.class_weight, n_outputs)


@dataclass(frozen=True, eq=False)
class BCEWithLogits(Loss):
    """Binary cross-entropy of the sigmoid of each output, for labels that don't exclude each other.

    ``l = mean_c [(1 - y_c) z_c + (1 + (p_c - 1) y_c) log(1 + exp(-z_c))]``, p the weight of the positive labels. As
    `torch.nn.BCEWithLogitsLoss`.

    Parameters
    ----------
    pos_weight : array-like (C,), optional
        p, finite and not negative; a number will do for a network with one output.
    """

    kind = "bce_with_logits"
    task = "multilabel"
    pos_weight: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pos_weight", _weights("pos_weight", self.pos_weight))

    @property
    def weight(self) -> np.ndarray | None:
        weights: np.ndarray | None = self.pos_weight
        return weights

    def check_outputs(self, n_outputs: int) -> None:
        _check_length("pos_weight", self.pos_weight, n_outputs)


@dataclass(frozen=True, eq=False)
class MSE(Loss):
    """Mean squared error, ``l = mean_c (z_c - y_c)^2``. As `torch.nn.MSELoss`."""

    kind = "mse"


@dataclass(frozen=True, eq=False)
class MAE(Loss):
    """Mean absolute error, ``l = mean_c |z_c - y_c|``, with gradient 0 where they are equal. As `torch.nn.L1Loss`."""

    kind = "mae"


@dataclass(frozen=True, eq=False)
class Huber(Loss):
    """Huber's loss, the mean over d = z_c - y_c of ``d^2/2`` where ``|d| <= delta``, else ``delta (|d| - delta/2)``.

    As `torch.nn.HuberLoss`.

    Parameters
    ----------
    delta : float, default 1
        Where the parabola becomes a line, greater than 0 (Huber 1964).
    """

    kind = "huber"
    delta: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "delta", number("delta", self.delta, "(0, inf)"))


LOSSES: dict[str, type[Loss]] = {cls.kind: cls for cls in (CrossEntropy, BCEWithLogits, MSE, MAE, Huber)}


def get(loss: str | Loss) -> Loss:
    """The loss called so, with its defaults; a `Loss` is returned as it is."""
    if isinstance(loss, Loss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a name or a Loss such as MSE() or Loss(f); got {loss!r}")
    if loss not in LOSSES:
        raise unknown_name("loss", loss, LOSSES)
    return LOSSES[loss]()


def _weights(argument: str, given: object) -> np.ndarray | None:
    """Weights as a read-only float64 copy."""
    if given is None:
        return None
    try:
        weights = np.atleast_1d(np.array(given, dtype=np.float64))
    except (TypeError, ValueError):
        raise TypeError(f"{argument} must be an array of numbers; got {given!r}") from None
    if weights.ndim != 1:
        raise ValueError(f"{argument} must have one dimension; got shape {weights.shape}")
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if wrong.size:
        raise ValueError(f"{argument} must be finite and >= 0; got {weights[wrong[0]]} at position {wrong[0]}")
    weights.flags.writeable = False
    return weights


def _check_length(argument: str, weights: np.ndarray | None, n_outputs: int) -> None:
    if weights is not None and len(weights) != n_outputs:
        raise ValueError(f"{argument} must have {n_outputs} values, one per output; got {len(weights)}")
