"""The pytest-benchmark suite of means over a stack of gradients: 8 to 256 of them, of 10^3 to 10^6 values."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from .functions import Call, compare

SHAPES = [(S, P) for S in (8, 32, 256) for P in (1000, 10_000, 100_000, 1_000_000)]
CASES = [(shape, "float32") for shape in SHAPES] + [((32, 1000), "float64"), ((32, 100_000), "float64")]
IDS = [f"{S}x{P}-{dtype}" for (S, P), dtype in CASES]


def _ways(peer: str, stack: np.ndarray) -> list[Call]:
    """A mean over the first axis, or, for the peers, a product with 1/S: whichever is faster."""
    out, share = np.empty_like(stack[0]), np.full(len(stack), 1 / len(stack), stack.dtype)
    if peer == "fastmb":
        from fastmb import ops

        return [lambda: ops.reduce_gradients(stack, out=out)]
    if peer == "numpy":
        return [lambda: np.mean(stack, axis=0, out=out), lambda: np.dot(share, stack, out=out)]
    if peer == "torch":
        import torch

        x, y, w = torch.from_numpy(stack), torch.from_numpy(out), torch.from_numpy(share)
        return [lambda: torch.mean(x, 0, out=y), lambda: torch.mv(x.T, w, out=y)]
    import jax

    jax.config.update("jax_enable_x64", stack.dtype == np.float64)
    mean, product = jax.jit(lambda x: jax.numpy.mean(x, axis=0)), jax.jit(jax.numpy.dot)
    w, x = jax.device_put((share, stack))
    return [lambda: mean(x).block_until_ready(), lambda: product(w, x).block_until_ready()]


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_reduction(benchmark: Any, index: int, threads: int) -> None:
    (S, P), dtype = CASES[index]
    shape = (S, min(P, 100_000)) if benchmark.disabled else (S, P)
    stack = np.random.default_rng(0).random(shape, np.float32).astype(dtype, copy=False)
    stack -= 0.5
    benchmark.group = "means of gradients"
    compare(
        benchmark,
        partial(_ways, stack=stack),
        stack.mean(axis=0, dtype=np.float64),
        case=f"{shape[0]} of {shape[1]}",
        shape=str(shape),
        dtype=dtype,
        threads=threads,
        moved=float(stack.nbytes + stack[0].nbytes),
    )
