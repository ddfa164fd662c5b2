"""Initial weights: a name or an array becomes the numbers a `Linear` starts from.

With fan_in = `in_features`, fan_out = `out_features` and the gain g of the activation that follows:

=================== ============================================== =============================
name                distribution                                   source
=================== ============================================== =============================
kaiming_uniform     U(-b, b), b = g sqrt(3 / fan_in)               He et al. 2015
kaiming_normal      N(0, s^2), s = g / sqrt(fan_in)                He et al. 2015
xavier_uniform      U(-b, b), b = sqrt(6 / (fan_in + fan_out))     Glorot and Bengio 2010
xavier_normal       N(0, s^2), s = sqrt(2 / (fan_in + fan_out))    Glorot and Bengio 2010
lecun_uniform       U(-b, b), b = sqrt(3 / fan_in)                 LeCun et al. 1998
lecun_normal        N(0, s^2), s = 1 / sqrt(fan_in)                LeCun et al. 1998
uniform             U(-b, b), b = 1 / sqrt(fan_in)                 the default of torch.nn.Linear
normal              N(0, s^2), s = 0.02                            Radford et al. 2018 (GPT)
zeros               0
=================== ============================================== =============================

The gain is sqrt(2) after ReLU, sqrt(2 / (1 + slope^2)) after LeakyReLU (both exact: they keep the mean square), sqrt(2)
after their smooth kin (ELU, GELU, SiLU, Mish, Softplus), 5/3 after tanh, and 1 after SELU, sigmoid or no activation.
"""

from __future__ import annotations

from math import sqrt

import numpy as np

from ._errors import unknown_name
from .rng import Stream

NAMES = (
    *(f"{scale}_{distribution}" for scale in ("kaiming", "xavier", "lecun") for distribution in ("uniform", "normal")),
    "uniform",
    "normal",
    "zeros",
)

Init = str | np.ndarray


def check(argument: str, init: object, shape: tuple[int, ...]) -> Init:
    """A known name, or the finite array of `shape` that `init` is, as a read-only float64 copy."""
    if isinstance(init, str):
        if init not in NAMES:
            raise unknown_name(argument, init, NAMES)
        return init
    try:
        array = np.array(init, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{argument} must be a name or an array of numbers; got {init!r}") from None
    if array.shape != shape:
        raise ValueError(f"{argument} must have shape {shape}; got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{argument} must be finite; got NaN or infinity")
    array.flags.writeable = False
    return array


def draw(init: Init, shape: tuple[int, ...], fans: tuple[int, int], gain: float, stream: Stream) -> np.ndarray:
    """The initial values, float64 of `shape`; `fans` are (fan_in, fan_out). Names take numbers from `stream`."""
    if not isinstance(init, str):
        return init
    n = int(np.prod(shape))
    if init == "zeros":
        return np.zeros(shape)
    if init.endswith("uniform"):
        return ((2 * stream.uniform(n) - 1) * (sqrt(3) * _deviation(init, *fans, gain))).reshape(shape)
    return (stream.normal(n) * _deviation(init, *fans, gain)).reshape(shape)


def _deviation(name: str, fan_in: int, fan_out: int, gain: float) -> float:
    """The standard deviation of an initialisation; a uniform one ends at sqrt(3) times it."""
    deviations = {
        "kaiming": gain / sqrt(fan_in),
        "xavier": sqrt(2 / (fan_in + fan_out)),
        "lecun": 1 / sqrt(fan_in),
        "uniform": 1 / sqrt(3 * fan_in),
        "normal": 0.02,
    }
    return deviations[name.split("_")[0]]
