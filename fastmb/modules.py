"""Modules: what a network is made of, as declarations.

A module says what it computes and owns no numbers, so it can be printed, compared and put into several networks. A new
activation is a class here, a row in `ACTIVATIONS`, and its kernels. Layers beside `Linear` are in `fastmb.layers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from . import _checks, init
from ._errors import unknown_name
from .plan import Op, Shapes
from .rng import Stream

if TYPE_CHECKING:
    from .functions import Function


@dataclass(frozen=True, repr=False)
class Module:
    """What all modules have."""

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING:
                shown.append(repr(value))
            elif isinstance(value, np.ndarray):
                shown.append(f"{field.name}=array of shape {value.shape}")
            elif value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


class Layer(Module):
    """A module with parameters of its own, or which needs more than each value by itself: a stage of a plan."""

    kind: ClassVar[str]  # the name that plans and executors know it by

    @property
    def takes(self) -> int | None:
        """The features that it takes; None if any number will do."""
        raise NotImplementedError

    @property
    def gives(self) -> int | None:
        """The features that it gives; None if as many as came."""
        return self.takes

    @property
    def shapes(self) -> Shapes:
        """Names and shapes of its parameters."""
        raise NotImplementedError

    @property
    def buffer_shapes(self) -> Shapes:
        """Names and shapes of what it keeps besides."""
        return ()

    def draw(self, name: str, gain: float, stream: Stream) -> Any:
        """The initial values of a parameter; `gain` is that of the activation which follows."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False, eq=False)
class Linear(Layer):
    """``x W + b`` with W of shape [in_features, out_features].

    Parameters
    ----------
    in_features, out_features : int
        Sizes, at least 1.
    bias : bool, default True
        Whether there is a b.
    init : str or array-like [in_features, out_features], default "kaiming_uniform"
        The initial W: values, or a name that `fastmb.init` lists with its formula. The default is
        U(-b, b) with ``b = g sqrt(3 / in_features)`` (He et al. 2015), where g is the gain of the activation that
        follows: sqrt(2) for ReLU and its kin, 5/3 for tanh, 1 for SELU, sigmoid and where none follows.
    bias_init : str or array-like [out_features], default "zeros"
        The initial b: values, or "zeros", "uniform" or "normal".

    Examples
    --------
    >>> Linear(784, 128, bias=False)
    Linear(784, 128, bias=False)
    """

    kind = "linear"
    in_features: int
    out_features: int
    bias: bool = True
    init: Any = "kaiming_uniform"
    bias_init: Any = "zeros"

    def __post_init__(self) -> None:
        n_in = _checks.integer("in_features", self.in_features, 1)
        n_out = _checks.integer("out_features", self.out_features, 1)
        bias_names = ("zeros", "uniform", "normal")
        if isinstance(self.bias_init, str) and self.bias_init not in bias_names:
            raise unknown_name("bias_init", self.bias_init, bias_names)
        checked = {
            "in_features": n_in,
            "out_features": n_out,
            "bias": _checks.boolean("bias", self.bias),
            "init": init.check("init", self.init, (n_in, n_out)),
            "bias_init": init.check("bias_init", self.bias_init, (n_out,)),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def takes(self) -> int:
        return self.in_features

    @property
    def gives(self) -> int:
        return self.out_features

    @property
    def shapes(self) -> Shapes:
        weight = ("weight", (self.in_features, self.out_features))
        return (weight, ("bias", (self.out_features,))) if self.bias else (weight,)

    def draw(self, name: str, gain: float, stream: Stream) -> np.ndarray:
        start = self.init if name == "weight" else self.bias_init
        return init.draw(start, dict(self.shapes)[name], (self.in_features, self.out_features), gain, stream)


class Activation(Module):
    """A function of your own, of each value by itself. The built-in activations are its subclasses.

    Compiled by Numba for blocks of numbers and run inside the training loop: ``pip install 'fastmb[numba]'``. The
    reference executor, ``"numpy"``, calls it number by number and needs no Numba.

    Parameters
    ----------
    f : callable
        ``f(x)``, a plain Python function of a number that gives a number, written with operators, ``if``, `abs`, `min`,
        `max`, functions of NumPy or `math`, and functions of that kind. It has to be finite for finite x, and must not
        raise: compiled, it gives NaN there. What it looks up elsewhere is taken as it is when the network is first
        used.
    df : callable, optional
        ``df(x)``, or ``df(x, f(x))``: its derivative. Left out, it is found by forward-mode differentiation of `f`.
    gain : float, default sqrt(2)
        Of the Kaiming initialisation of a `Linear` before it. The default is that of ReLU and its smooth kin.

    Raises
    ------
    TypeError
        If a function takes other numbers than these, or gives no real number.
    ValueError
        If `f` isn't finite, or `df` is not its derivative: finite differences are compared at some points from -7.4 to
        7.3.

    Notes
    -----
    The same bits for any number of threads on one machine. exp, expm1, exp2, log, log1p, log2, log10, tanh, sinh, cosh,
    erf, erfc, logaddexp and what is + - * / and a choice become vector code; other functions are called one number at a
    time and are slow.

    Examples
    --------
    >>> import numpy as np
    >>> def mish(x):
    ...     return x * np.tanh(np.log1p(np.exp(x)))
    >>> Activation(mish)
    Activation(mish)
    >>> Activation(np.tanh, df=lambda x, y: 1 - y * y, gain=5 / 3)
    Activation(tanh, gain=1.6666666666666667)
    """

    kind: str = "custom"  # the name that plans and executors know it by
    gain: float = math.sqrt(2)  # of the Kaiming initialisation of a `Linear` before it
    function: Function | None = None  # a user's own

    def __init__(
        self, f: Callable[..., Any] | None = None, df: Callable[..., Any] | None = None, *, gain: float = math.sqrt(2)
    ) -> None:
        from .functions import Function

        object.__setattr__(self, "gain", _checks.number("gain", gain, "(0, inf)"))
        object.__setattr__(self, "function", Function(f, df, arity=1))

    def __repr__(self) -> str:
        if self.function is None:
            return super().__repr__()
        return f"Activation({self.function.name}{'' if self.gain == Activation.gain else f', gain={self.gain!r}'})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and (self.function, self.gain) == (other.function, other.gain)

    def __hash__(self) -> int:
        return hash((self.function, self.gain))

    @property
    def op(self) -> Op:
        return Op(self.kind, function=self.function)


@dataclass(frozen=True, repr=False)
class Identity(Activation):
    """The input as it is."""

    kind = "identity"
    gain = 1.0


@dataclass(frozen=True, repr=False)
class ReLU(Activation):
    """max(x, 0), with derivative 0 at 0."""

    kind = "relu"


@dataclass(frozen=True, repr=False)
class LeakyReLU(Activation):
    """x where x > 0, else negative_slope x (Maas et al. 2013)."""

    kind = "leaky_relu"
    negative_slope: float = 0.01

    def __post_init__(self) -> None:
        slope = _checks.number("negative_slope", self.negative_slope, "(-inf, inf)")
        object.__setattr__(self, "negative_slope", slope)
        object.__setattr__(self, "gain", math.sqrt(2 / (1 + slope**2)))

    @property
    def op(self) -> Op:
        return Op(self.kind, self.negative_slope)


@dataclass(frozen=True, repr=False)
class ELU(Activation):
    """x where x > 0, else alpha (exp(x) - 1) (Clevert et al. 2016)."""

    kind = "elu"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", _checks.number("alpha", self.alpha, "(0, inf)"))

    @property
    def op(self) -> Op:
        return Op(self.kind, self.alpha)


@dataclass(frozen=True, repr=False)
class SELU(Activation):
    """1.0507 ELU(x) with alpha 1.6733: keeps mean 0 and variance 1 (Klambauer et al. 2017)."""

    kind = "selu"
    gain = 1.0


@dataclass(frozen=True, repr=False)
class GELU(Activation):
    """x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016).

    With ``approximate="tanh"``: ``x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``.
    """

    approximate: str = "none"

    def __post_init__(self) -> None:
        if self.approximate not in ("none", "tanh"):
            raise unknown_name("approximate", self.approximate, ("none", "tanh"))
        object.__setattr__(self, "kind", "gelu" if self.approximate == "none" else "gelu_tanh")


@dataclass(frozen=True, repr=False)
class SiLU(Activation):
    """x sigmoid(x), also called swish (Elfwing et al. 2018)."""

    kind = "silu"


@dataclass(frozen=True, repr=False)
class Mish(Activation):
    """x tanh(softplus(x)) (Misra 2020)."""

    kind = "mish"


@dataclass(frozen=True, repr=False)
class Softplus(Activation):
    """log(1 + exp(x))."""

    kind = "softplus"


@dataclass(frozen=True, repr=False)
class Tanh(Activation):
    """The hyperbolic tangent."""

    kind = "tanh"
    gain = 5 / 3


@dataclass(frozen=True, repr=False)
class Sigmoid(Activation):
    """1 / (1 + exp(-x))."""

    kind = "sigmoid"
    gain = 1.0


ACTIVATIONS: dict[str, Callable[[], Activation]] = {
    "identity": Identity,
    "relu": ReLU,
    "leaky_relu": LeakyReLU,
    "elu": ELU,
    "selu": SELU,
    "gelu": GELU,
    "gelu_tanh": partial(GELU, approximate="tanh"),
    "silu": SiLU,
    "mish": Mish,
    "softplus": Softplus,
    "tanh": Tanh,
    "sigmoid": Sigmoid,
}


@dataclass(frozen=True, repr=False)
class Dropout(Module):
    """While training, each value is 0 with probability p, else divided by 1 - p (Srivastava et al. 2014).

    `p` may be a function of the number of updates made so far, such as one of `fastmb.schedules`. The masks are
    functions of the trainer's seed, the step, the row and the unit: no thread can change them.
    """

    p: float | Callable[[int], float] = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", _checks.number_or_schedule("p", self.p, "[0, 1)"))


@dataclass(frozen=True, repr=False)
class Softmax(Module):
    """exp(x_c) / sum exp(x), as the last module: `Sequential` then gives probabilities.

    The cross-entropy takes what comes before it, so that it stays exact where the softmax would be rounded to 0 or 1.
    """
