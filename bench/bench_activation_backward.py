"""The pytest-benchmark suite of activations' way back, from 64 to 10^7 values: relu and gelu from their input, tanh and
sigmoid from their output."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from .functions import Call, compare

SIZES = [64, 1000, 10_000, 100_000, 1_000_000, 10_000_000]
CASES = [(kind, size, "float32") for kind in ("relu", "tanh", "sigmoid", "gelu") for size in SIZES]
CASES += [(kind, size, "float64") for kind in ("relu", "tanh") for size in (1000, 1_000_000)]
IDS = [f"{kind}-{size}-{dtype}" for kind, size, dtype in CASES]


def _exact(kind: str, da: np.ndarray, x: np.ndarray) -> np.ndarray:
    from fastmb import ops

    given = {"a" if kind in ("tanh", "sigmoid") else "z": x.astype(np.float64)}
    if kind == "gelu":  # the reference's erfc goes one value at a time
        given["z"] = given["z"][:10_000]
        da = da[:10_000]
    return ops.activation_backward(da.astype(np.float64), kind, backend="numpy", **given)


def _ways(peer: str, kind: str, da: np.ndarray, x: np.ndarray) -> list[Call]:
    out = np.empty_like(da)
    if peer == "fastmb":
        from fastmb import ops

        if kind in ("tanh", "sigmoid"):
            return [lambda: ops.activation_backward(da, kind, a=x, out=out)]
        return [lambda: ops.activation_backward(da, kind, z=x, out=out)]
    if peer == "numpy":
        return [_numpy(kind, da, x, out)]
    if peer == "torch":
        import torch

        d, v, o = (torch.from_numpy(y) for y in (da, x, out))
        function = getattr(torch.ops.aten, f"{'threshold' if kind == 'relu' else kind}_backward").grad_input
        return [partial(function, d, v, *([0] if kind == "relu" else []), grad_input=o)]
    import jax
    from jax import numpy as jnp

    jax.config.update("jax_enable_x64", da.dtype == np.float64)
    functions: dict[str, Any] = {
        "relu": lambda d, v: jnp.where(v > 0, d, 0),
        "tanh": lambda d, a: d * (1 - a * a),
        "sigmoid": lambda d, a: d * a * (1 - a),
        "gelu": lambda d, v: jax.vjp(lambda z: jax.nn.gelu(z, approximate=False), v)[1](d)[0],
    }
    compiled, (d, v) = jax.jit(functions[kind]), jax.device_put((da, x))
    return [lambda: compiled(d, v).block_until_ready()]


def _numpy(kind: str, da: np.ndarray, x: np.ndarray, out: np.ndarray) -> Call:
    """In as few passes as NumPy can; it has no erf."""
    mask = np.empty(da.shape, bool)

    def relu() -> np.ndarray:
        return np.multiply(da, np.greater(x, 0, out=mask), out=out)

    def tanh() -> np.ndarray:
        np.multiply(x, x, out=out)
        np.subtract(1, out, out=out)
        return np.multiply(out, da, out=out)

    def sigmoid() -> np.ndarray:
        np.subtract(1, x, out=out)
        np.multiply(out, x, out=out)
        return np.multiply(out, da, out=out)

    return {"relu": relu, "tanh": tanh, "sigmoid": sigmoid}[kind]


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_activation_backward(benchmark: Any, index: int, threads: int) -> None:
    from fastmb import ops

    kind, size, dtype = CASES[index]
    rng = np.random.default_rng(0)
    da, z = (rng.standard_normal(size).astype(dtype) for _ in range(2))
    x = ops.activation_forward(z, kind, backend="numpy") if kind in ("tanh", "sigmoid") else z
    without = {"numpy": "numpy left out: it has no erf"} if kind == "gelu" else {}
    benchmark.group = "activations' way back"
    compare(
        benchmark,
        partial(_ways, kind=kind, da=da, x=x),
        _exact(kind, da, x),
        case=f"{kind}, {size}",
        shape=str(da.shape),
        dtype=dtype,
        threads=threads,
        without=without,
        moved=3.0 * da.nbytes,
    )
