"""The pytest-benchmark suite of means over a stack of gradients: 8 to 256 of them, of 10^3 to 10^6 values."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from .cases import PEERS, Call, Case, clock, limits, run, unfit

ALL = len(os.sched_getaffinity(0))
SHAPES = [(S, P) for S in (8, 32, 256) for P in (1000, 10_000, 100_000, 1_000_000) if S * P <= 1 << 26]
CASES = [(shape, "float32") for shape in SHAPES] + [((32, 1000), "float64"), ((32, 100_000), "float64")]
IDS = [f"{S}x{P}-{dtype}" for (S, P), dtype in CASES]


@lru_cache(maxsize=1)
def case(index: int, threads: int) -> Case:
    """A case with the calls of the peers that are here."""
    shape, dtype = CASES[index]
    stack = np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)
    calls = {peer: _call(peer, stack) for peer in PEERS if unfit(peer, threads, ALL) is None}
    exact = stack.mean(axis=0, dtype=np.float64)
    return Case(IDS[index], dtype, threads, calls, exact, bytes=float(stack.nbytes + stack[0].nbytes))


def _call(peer: str, stack: np.ndarray) -> Call:
    out = np.empty_like(stack[0])
    if peer == "fastmb":
        from fastmb import ops

        return lambda: ops.reduce_gradients(stack, out=out)
    if peer == "numpy":
        return lambda: np.mean(stack, axis=0, out=out)
    if peer == "torch":
        import torch

        x, y = torch.from_numpy(stack), torch.from_numpy(out)
        return lambda: torch.mean(x, 0, out=y)
    import jax

    jax.config.update("jax_enable_x64", stack.dtype == np.float64)
    mean, array = jax.jit(lambda x: jax.numpy.mean(x, axis=0)), jax.device_put(stack)
    return lambda: mean(array).block_until_ready()


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("threads", sorted({1, ALL}))
@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_reduction(benchmark: Any, index: int, threads: int, peer: str) -> None:
    if why := unfit(peer, threads, ALL):
        pytest.skip(why)
    with limits(threads):
        run(benchmark, case(index, threads), peer)
