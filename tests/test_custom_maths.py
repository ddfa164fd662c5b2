"""The elementary functions of users' functions: a few ulp from 50 digits anywhere, and NumPy's answer at the ends."""

import runpy
from pathlib import Path

import mpmath
import numba
import numpy as np
import pytest
from mpmath import mpf

from fastmb.functions.compiler import jit
from fastmb.functions.maths import FUNCTIONS

# Not on sys.path: pytest imports test modules by themselves.
ulps = runpy.run_path(str(Path(__file__).with_name("reference_math.py")))["ulps"]

DTYPES = ["float32", "float64"]
BOUNDS = {  # ulp: the largest found is a little below
    "exp": 1.1,
    "exp2": 1.3,
    "expm1": 1.3,
    "log": 1.8,
    "log2": 3,
    "log10": 3.3,
    "log1p": 2.3,
    "tanh": 1.7,
    "sinh": 1.7,
    "cosh": 1.3,
    "erf": 2.3,
    "erfc": 8,
    "sqrt": 0.5001,
}
EXACT = {
    "exp2": lambda x: mpf(2) ** x,
    "log2": lambda x: mpmath.log(x, 2),
    "log10": mpmath.log10,
}


def vectorised(name):
    """The function over an array, as it is compiled in a block."""
    function = FUNCTIONS[name]

    @numba.njit(error_model="numpy")
    def loop(x, out):
        for i in range(x.size):
            out[i] = function(x[i])

    def call(x):
        out = np.full_like(x, np.nan)
        loop(x, out)
        return out

    return call


def arguments(name, dtype):
    rng = np.random.default_rng(1)
    info = np.finfo(dtype)
    top = np.log(info.max)
    small = 10.0 ** rng.uniform(-12, 0, 400)
    wide = np.concatenate([rng.uniform(0, 4, 600), rng.uniform(0, top - 1, 600), small])
    if name.startswith("log") and name != "log1p":
        x = np.concatenate([10.0 ** rng.uniform(-30, 30, 800), rng.uniform(0.5, 2, 600), 1 + small / 4, 1 - small / 4])
    elif name == "log1p":
        x = np.concatenate([wide, -rng.uniform(0, 0.999, 600), -small * 0.999])
    elif name == "sqrt":
        x = wide
    elif name == "erfc":
        x = np.concatenate([rng.uniform(-6, 6, 800), rng.uniform(0, 8, 400)])
    elif name == "exp2":
        x = np.concatenate([wide, -wide]) / np.log(2)
    else:
        x = np.concatenate([wide, -wide])
    return x.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BOUNDS)
def test_a_few_ulp_from_the_exact_value(name, dtype):
    x = arguments(name, dtype)
    exact = EXACT.get(name) or getattr(mpmath, name)
    expected = [exact(mpf(v)) for v in x.tolist()]
    assert ulps(vectorised(name)(x), expected) < BOUNDS[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BOUNDS)
def test_the_ends_are_those_of_numpy(name, dtype):
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30, -1.0, -2.0, 100.0, -100.0, 800.0, -800.0], dtype)
    if name in ("erf", "erfc"):
        expected = np.array([float(getattr(mpmath, name)(mpf(v))) for v in x.tolist()], dtype)
    else:
        with np.errstate(all="ignore"):
            expected = getattr(np, name)(x)
    expected = np.where(np.abs(expected) < np.finfo(dtype).tiny, 0 * np.sign(expected), expected)
    np.testing.assert_allclose(vectorised(name)(x), expected, rtol=16 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_float_stays_what_it_is(dtype):
    T = np.dtype(dtype).type
    half = 0.5

    @jit
    def f(x):
        if x > 3:
            return 2 * x + half
        return np.maximum(x, 0) - x**2 / 7 + 0.25 + (x > 1) * x

    f.compile((numba.from_dtype(np.dtype(dtype)),))
    assert str(f.nopython_signatures[0].return_type) == dtype
    for x in (-1.7, 0.3, 5.1):
        x = T(x)
        expected = T(2) * x + T(half) if x > 3 else np.maximum(x, T(0)) - x * x / T(7) + T(0.25) + T(x > 1) * x
        assert T(f(x)) == expected
