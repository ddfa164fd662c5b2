"""The pytest-benchmark suite of activations' way back, from 64 to 10^7 values: relu and gelu from their input, tanh and
sigmoid from their output."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from .cases import PEERS, Call, Case, clock, limits, run, unfit

ALL = len(os.sched_getaffinity(0))
SIZES = [64, 1000, 10_000, 100_000, 1_000_000, 10_000_000]
CASES = [(kind, size, "float32") for kind in ("relu", "tanh", "sigmoid", "gelu") for size in SIZES]
CASES += [(kind, size, "float64") for kind in ("relu", "tanh") for size in (1000, 1_000_000)]
IDS = [f"{kind}-{size}-{dtype}" for kind, size, dtype in CASES]


@lru_cache(maxsize=1)
def case(index: int, threads: int) -> Case:
    """A case with the calls of the peers that are here."""
    from fastmb import ops

    kind, size, dtype = CASES[index]
    rng = np.random.default_rng(0)
    da, z = (rng.standard_normal(size).astype(dtype) for _ in range(2))
    x = ops.activation_forward(z, kind, backend="numpy") if kind in ("tanh", "sigmoid") else z
    calls = {}
    for peer in PEERS:
        if unfit(peer, threads, ALL) is None and (call := _call(peer, kind, da, x)):
            calls[peer] = call
    return Case(IDS[index], dtype, threads, calls, _exact(kind, da, x), bytes=3.0 * da.nbytes)


def _exact(kind: str, da: np.ndarray, x: np.ndarray) -> np.ndarray:
    from fastmb import ops

    given = {"a" if kind in ("tanh", "sigmoid") else "z": x.astype(np.float64)}
    if kind == "gelu":  # the reference's erfc goes one value at a time
        given["z"] = given["z"][:10_000]
        da = da[:10_000]
    return ops.activation_backward(da.astype(np.float64), kind, backend="numpy", **given)


def _call(peer: str, kind: str, da: np.ndarray, x: np.ndarray) -> Call | None:
    """A call that returns its first values: all of them, or as many as `_exact` has."""
    out = np.empty_like(da)
    shown = slice(10_000) if kind == "gelu" else slice(None)
    if peer == "fastmb":
        from fastmb import ops

        if kind in ("tanh", "sigmoid"):
            return lambda: ops.activation_backward(da, kind, a=x, out=out)[shown]
        return lambda: ops.activation_backward(da, kind, z=x, out=out)[shown]
    if peer == "numpy":
        return _numpy(kind, da, x, out)
    if peer == "torch":
        import torch

        aten = torch.ops.aten
        d, v, o = (torch.from_numpy(y) for y in (da, x, out))
        calls: dict[str, Call] = {
            "relu": lambda: aten.threshold_backward.grad_input(d, v, 0, grad_input=o),
            "tanh": lambda: aten.tanh_backward.grad_input(d, v, grad_input=o),
            "sigmoid": lambda: aten.sigmoid_backward.grad_input(d, v, grad_input=o),
            "gelu": lambda: aten.gelu_backward.grad_input(d, v, grad_input=o)[shown],
        }
        return calls[kind]
    import jax
    from jax import numpy as jnp

    jax.config.update("jax_enable_x64", da.dtype == np.float64)
    functions: dict[str, Any] = {
        "relu": lambda d, v: jnp.where(v > 0, d, 0),
        "tanh": lambda d, a: d * (1 - a * a),
        "sigmoid": lambda d, a: d * a * (1 - a),
        "gelu": lambda d, v: jax.vjp(lambda z: jax.nn.gelu(z, approximate=False), v)[1](d)[0],
    }
    compiled, arrays = jax.jit(functions[kind]), jax.device_put((da, x))
    if kind == "gelu":
        return lambda: _first(compiled, arrays)
    return lambda: compiled(*arrays).block_until_ready()


def _first(compiled: Any, arrays: Any) -> np.ndarray:
    """The first values of a result, by way of a NumPy view: nothing is computed to take them."""
    return np.asarray(compiled(*arrays).block_until_ready())[:10_000]


def _numpy(kind: str, da: np.ndarray, x: np.ndarray, out: np.ndarray) -> Call | None:
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

    return {"relu": relu, "tanh": tanh, "sigmoid": sigmoid}.get(kind)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("threads", sorted({1, ALL}))
@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_activation_backward(benchmark: Any, index: int, threads: int, peer: str) -> None:
    if why := unfit(peer, threads, ALL):
        pytest.skip(why)
    if peer == "numpy" and CASES[index][0] == "gelu":
        pytest.skip("numpy left out: it has no erf")
    with limits(threads):
        run(benchmark, case(index, threads), peer)
