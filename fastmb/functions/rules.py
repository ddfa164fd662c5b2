"""How the functions of one number are differentiated: name -> dy/dx as a function of x and y = f(x).

The same lines run in Python and, rebound, compiled.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from typing import Any

import numpy as np

SLOPES: dict[str, Callable[[Any, Any], Any]] = {
    "exp": lambda x, y: y,
    "exp2": lambda x, y: y * 0.6931471805599453,
    "expm1": lambda x, y: y + 1,
    "log": lambda x, y: 1 / x,
    "log2": lambda x, y: 1.4426950408889634 / x,
    "log10": lambda x, y: 0.4342944819032518 / x,
    "log1p": lambda x, y: 1 / (1 + x),
    "sqrt": lambda x, y: 0.5 / y,
    "square": lambda x, y: 2 * x,
    "reciprocal": lambda x, y: -y * y,
    "abs": lambda x, y: np.sign(x),
    "sign": lambda x, y: 0 * x,
    "tanh": lambda x, y: 1 - y * y,
    "sinh": lambda x, y: np.cosh(x),
    "cosh": lambda x, y: np.sinh(x),
    "sin": lambda x, y: np.cos(x),
    "cos": lambda x, y: -np.sin(x),
    "tan": lambda x, y: 1 + y * y,
    "arctan": lambda x, y: 1 / (1 + x * x),
    "arcsinh": lambda x, y: 1 / np.sqrt(1 + x * x),
    "erf": lambda x, y: 1.1283791670955126 * np.exp(-x * x),
    "erfc": lambda x, y: -1.1283791670955126 * np.exp(-x * x),
}

# Where people find these functions, and those of two numbers. What is not here is left as it is.
SOURCES: dict[str, tuple[Any, ...]] = {
    **{name: (getattr(np, name, None), getattr(math, name, None)) for name in SLOPES},
    "abs": (np.abs, np.fabs, math.fabs, builtins.abs),
    "arctan": (np.arctan, math.atan),
    "arcsinh": (np.arcsinh, math.asinh),
    "maximum": (builtins.max, np.maximum, np.fmax),
    "minimum": (builtins.min, np.minimum, np.fmin),
    "power": (np.power, np.float_power, math.pow, builtins.pow),
    "logaddexp": (np.logaddexp,),
    "where": (np.where,),
    "clip": (np.clip,),
}
NAMES = {id(source): name for name, sources in SOURCES.items() for source in sources if source is not None}
