"""A user's own activation against the built-in one in a whole step, float32 and float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fastmb as mb

from .turns import Contender, in_turn
from .workloads import Workload

WORK = Workload("mish", (64, 256, 256, 10), 128, "momentum", "cross_entropy", 8192)


def mish(x: Any) -> Any:
    return x * np.tanh(np.log1p(np.exp(x)))


def trainer(activation: Any, dtype: str, threads: int) -> mb.Trainer:
    net = mb.mlp(WORK.sizes, activation=activation, dtype=dtype)
    return mb.Trainer(net, optimizer=mb.SGD(lr=WORK.lr, momentum=0.9), batch_size=WORK.batch, n_threads=threads)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_own_mish(benchmark: Any, dtype: str, threads: int) -> None:
    pytest.importorskip("numba")
    work = replace(WORK, rows=WORK.batch) if benchmark.disabled else WORK
    X, y = work.data(dtype)
    contenders, errors = {}, {}
    exact = trainer("mish", "float64", 1).gradients(X[:128], y[:128])[1]
    for name, activation in {"fastmb": mb.Activation(mish), "built-in": "mish"}.items():
        trained = trainer(activation, dtype, threads)
        gradient = trained.gradients(X[:128], y[:128])[1]
        errors[name] = max(float(np.abs(gradient[k] - exact[k]).max() / np.abs(exact[k]).max()) for k in exact)

        def run(epochs: int, trained: mb.Trainer = trained) -> None:
            trained.fit(X, y, max_epochs=epochs, verbose=0)

        contenders[name] = Contender(run, work.steps, packages=("numba",) * (name == "fastmb"))
    benchmark.group = "an activation of one's own"
    in_turn(
        benchmark,
        contenders,
        case=f"mish, {dtype}",
        shape=f"{work.shape}, batch {work.batch}",
        dtype=dtype,
        threads=threads,
        flops=work.flops,
        errors=errors,
        baseline="built-in",
        asked=1.5,
    )
