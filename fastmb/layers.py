"""Layers beside `Linear`: normalisations, an activation with parameters, and `Residual`.

Names, defaults and semantics are those of `torch.nn`. As all modules they are declarations and own no numbers:
parameters and running statistics live in the network, named "1.weight", "1.bias", "1.running_mean".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from . import _checks
from .modules import Layer, Module
from .plan import Shapes
from .rng import Stream


@dataclass(frozen=True, repr=False)
class BatchNorm1d(Layer):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, of each feature over the mini-batch (Ioffe and Szegedy 2015).

    In training, mean and variance (biased) are those of the mini-batch's rows; sample weights are not in them. Each
    update moves the running statistics towards them, ``running = (1 - momentum) running + momentum new`` with the
    unbiased variance, and `evaluate`, `predict` and calls of the network take these. As `torch.nn.BatchNorm1d`.

    A mini-batch must have more than one row. The sums of a feature run in 32 lanes over the rows, whatever the number
    of threads.

    Parameters
    ----------
    num_features : int
        Features, at least 1.
    eps : float, default 1e-5
        Added to the variance, greater than 0.
    momentum : float or None, default 0.1
        The share of the new statistics, in [0, 1]; None: running statistics are the mean over all mini-batches.
    affine : bool, default True
        Whether there are a weight, initially 1, and a bias, initially 0, each (num_features,).

    Examples
    --------
    >>> import fastmb as mb
    >>> net = mb.Sequential(mb.Linear(64, 32, bias=False), mb.BatchNorm1d(32), mb.ReLU(), mb.Linear(32, 10))
    >>> list(net.buffers())
    ['1.running_mean', '1.running_var', '1.num_batches_tracked']
    """

    kind = "batch_norm"
    num_features: int
    eps: float = 1e-5
    momentum: float | None = 0.1
    affine: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_features", _checks.integer("num_features", self.num_features, 1))
        object.__setattr__(self, "eps", _checks.number("eps", self.eps, "(0, inf)"))
        if self.momentum is not None:
            object.__setattr__(self, "momentum", _checks.number("momentum", self.momentum, "[0, 1]"))
        object.__setattr__(self, "affine", _checks.boolean("affine", self.affine))

    @property
    def takes(self) -> int:
        return self.num_features

    @property
    def shapes(self) -> Shapes:
        return tuple((name, (self.num_features,)) for name in ("weight", "bias") if self.affine)

    @property
    def buffer_shapes(self) -> Shapes:
        n = (self.num_features,)
        return ("running_mean", n), ("running_var", n), ("num_batches_tracked", (1,))

    def draw(self, name: str, gain: float, stream: Stream) -> float:  # noqa: ARG002
        return float(name == "weight")


@dataclass(frozen=True, repr=False)
class LayerNorm(Layer):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, of each row over its features (Ba et al. 2016).

    The variance is the biased one. The same in training and in prediction. As `torch.nn.LayerNorm`.

    Parameters
    ----------
    normalized_shape : int
        Features, at least 1.
    eps : float, default 1e-5
        Added to the variance, greater than 0.
    elementwise_affine : bool, default True
        Whether there are a weight, initially 1, and a bias, initially 0, each (normalized_shape,).
    bias : bool, default True
        With False, there is no bias.

    Examples
    --------
    >>> LayerNorm(64, bias=False)
    LayerNorm(64, bias=False)
    """

    kind = "layer_norm"
    normalized_shape: int
    eps: float = 1e-5
    elementwise_affine: bool = True
    bias: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "normalized_shape", _checks.integer("normalized_shape", self.normalized_shape, 1))
        object.__setattr__(self, "eps", _checks.number("eps", self.eps, "(0, inf)"))
        for name in ("elementwise_affine", "bias"):
            object.__setattr__(self, name, _checks.boolean(name, getattr(self, name)))

    @property
    def takes(self) -> int:
        return self.normalized_shape

    @property
    def shapes(self) -> Shapes:
        names = ("weight", "bias")[: self.elementwise_affine * (1 + self.bias)]
        return tuple((name, (self.normalized_shape,)) for name in names)

    def draw(self, name: str, gain: float, stream: Stream) -> float:  # noqa: ARG002
        return float(name == "weight")


@dataclass(frozen=True, repr=False)
class PReLU(Layer):
    """x where x > 0, else ``weight * x``, where the weight is learned (He et al. 2015). As `torch.nn.PReLU`.

    Parameters
    ----------
    num_parameters : int, default 1
        1, one weight for all features, or as many as there are features.
    init : float, default 0.25
        Their initial value.

    Examples
    --------
    >>> PReLU(32)
    PReLU(num_parameters=32)
    """

    kind = "prelu"
    num_parameters: int = 1
    init: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_parameters", _checks.integer("num_parameters", self.num_parameters, 1))
        object.__setattr__(self, "init", _checks.number("init", self.init, "(-inf, inf)"))

    @property
    def takes(self) -> int | None:
        return None if self.num_parameters == 1 else self.num_parameters

    @property
    def gain(self) -> float:
        """As that of `LeakyReLU`."""
        return math.sqrt(2 / (1 + self.init**2))

    @property
    def shapes(self) -> Shapes:
        return (("weight", (self.num_parameters,)),)

    def draw(self, name: str, gain: float, stream: Stream) -> float:  # noqa: ARG002
        return self.init


@dataclass(frozen=True, repr=False, init=False)
class Residual(Module):
    """``modules(x) + x``: what the modules give is added to what they take (He et al. 2016). They may be nested.

    Parameters
    ----------
    *modules : Module
        One after the other, as in `Sequential`; they must give as many features as they take.

    Examples
    --------
    >>> import fastmb as mb
    >>> block = mb.Residual(mb.LayerNorm(32), mb.Linear(32, 32), mb.GELU())
    >>> net = mb.Sequential(mb.Linear(64, 32), block, mb.Linear(32, 10))
    >>> net.parameters()["1.1.weight"].shape
    (32, 32)
    """

    modules: tuple[Module, ...]

    def __init__(self, *modules: Any) -> None:
        if not modules:
            raise ValueError("Residual must hold at least one module; got none")
        for i, module in enumerate(modules):
            if not isinstance(module, Module):
                raise TypeError(f"modules[{i}] of Residual must be a module such as Linear(64, 64); got {module!r}")
        object.__setattr__(self, "modules", modules)

    def __repr__(self) -> str:
        return f"Residual({', '.join(map(repr, self.modules))})"
