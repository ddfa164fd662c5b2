"""The pytest-benchmark suite of matrix products: batches of small ones, single large ones, tall and odd ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from .functions import Call, compare

BATCHED = [(512, n, n, n) for n in (8, 12, 16, 24, 32)] + [(64, n, n, n) for n in (64, 96, 128)]
LARGE = [(1, n, n, n) for n in (256, 512, 1024, 2048)]
ODD = [(1, 784, 64, 10), (1, 10_007, 3, 5), (1, 33, 65, 129)]
TINY = [(1, 8, 8, 8)]
# count x m x k x n, which factors are transposed ("N" no, "T" yes), dtype
CASES = [(shape, "NN", "float32") for shape in BATCHED + LARGE + ODD + TINY]
CASES += [(shape, flags, "float32") for shape in [*ODD, (1, 512, 512, 512)] for flags in ("TN", "NT")]
CASES += [(shape, "NN", "float64") for shape in [(512, 16, 16, 16), (64, 64, 64, 64), (1, 512, 512, 512)]]
NAMES = {"NN": "", "TN": ", A transposed", "NT": ", B transposed"}
IDS = [f"{'x'.join(map(str, shape))}-{flags}-{dtype}" for shape, flags, dtype in CASES]


def _ways(peer: str, a: np.ndarray, b: np.ndarray, flags: str) -> list[Call]:
    transpose_a, transpose_b = (flag == "T" for flag in flags)
    left, right = (x.swapaxes(-1, -2) if flag == "T" else x for x, flag in zip((a, b), flags, strict=True))
    out = np.empty((*a.shape[:-2], left.shape[-2], right.shape[-1]), a.dtype)
    if peer == "fastmb":
        from fastmb import ops

        return [lambda: ops.matmul(a, b, transpose_a=transpose_a, transpose_b=transpose_b, out=out)]
    if peer == "numpy":
        ways: list[Call] = [partial(np.matmul, left, right, out=out)]
        return ways if a.ndim > 2 else [*ways, partial(np.dot, left, right, out=out)]
    if peer == "torch":
        import torch

        x, y, z = torch.from_numpy(left), torch.from_numpy(right), torch.from_numpy(out)
        return [partial(torch.bmm if a.ndim > 2 else torch.mm, x, y, out=z)]
    import jax

    jax.config.update("jax_enable_x64", a.dtype == np.float64)
    x, y = jax.device_put((a, b))
    product = jax.jit(
        lambda x, y: jax.numpy.matmul(x.mT if transpose_a else x, y.mT if transpose_b else y, precision="highest")
    )
    return [lambda: product(x, y).block_until_ready()]


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_matmul(benchmark: Any, index: int, threads: int) -> None:
    (count, m, k, n), flags, dtype = CASES[index]
    rng = np.random.default_rng(0)
    a_shape, b_shape = ((k, m) if flags[0] == "T" else (m, k)), ((n, k) if flags[1] == "T" else (k, n))
    batch = (count,) if count > 1 else ()
    a, b = (rng.standard_normal((*batch, *shape)).astype(dtype) for shape in (a_shape, b_shape))
    left, right = (x.swapaxes(-1, -2) if flag == "T" else x for x, flag in zip((a, b), flags, strict=True))
    exact = np.matmul(left.astype(np.float64), right.astype(np.float64))
    benchmark.group = "matrix products"
    name = f"{'x'.join(map(str, (m, k, n)))}{'' if count == 1 else f', {count} of them'}"
    compare(
        benchmark,
        partial(_ways, a=a, b=b, flags=flags),
        exact,
        case=f"{name}{NAMES[flags]}",
        shape=f"{a.shape} x {b.shape}",
        dtype=dtype,
        threads=threads,
        flops=2.0 * count * m * k * n,
    )
